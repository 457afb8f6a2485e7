//! What every backend has to do.

use std::sync::Arc;

use overspill_device::{DeviceRange, Error, Gate, HostExtent, InFlight, StreamRef, offload, onboard};

use super::{Rig, folded, release_on};

/// Panics where the backend is wrong.
pub type Case = fn(&dyn Rig);

/// Every case and its name.
pub const CASES: &[(&str, Case)] = &[
    ("a_stream_keeps_its_order", a_stream_keeps_its_order),
    ("bytes_come_back_whatever_their_number", bytes_come_back_whatever_their_number),
    ("a_batch_moves_every_piece", a_batch_moves_every_piece),
    ("a_stream_waits_for_another", a_stream_waits_for_another),
    ("an_event_passes_once_and_has_a_time", an_event_passes_once_and_has_a_time),
    ("the_host_waits_for_the_copy_that_fills_an_extent", the_host_waits_for_the_copy_that_fills_an_extent),
    ("onboarding_waits_for_the_offload_of_its_extent", onboarding_waits_for_the_offload_of_its_extent),
    ("a_lease_on_the_source_outlives_its_owner", a_lease_on_the_source_outlives_its_owner),
    ("a_released_source_may_be_overwritten_in_order", a_released_source_may_be_overwritten_in_order),
    ("an_extent_is_not_reused_under_a_copy", an_extent_is_not_reused_under_a_copy),
    ("claims_are_disjoint_and_come_back", claims_are_disjoint_and_come_back),
    ("sizes_that_differ_are_refused", sizes_that_differ_are_refused),
    ("too_much_memory_is_an_error", too_much_memory_is_an_error),
    ("queued_jobs_keep_their_order_and_may_copy", queued_jobs_keep_their_order_and_may_copy),
    ("a_wrapped_stream_takes_part", a_wrapped_stream_takes_part),
    ("many_streams_at_once", many_streams_at_once),
    ("everything_may_be_dropped_at_any_time", everything_may_be_dropped_at_any_time),
];

fn send_out(stream: &StreamRef, range: &DeviceRange, extent: HostExtent) -> (InFlight, Arc<HostExtent>) {
    let (in_flight, mut extents) = offload(stream, vec![(range.clone(), extent)]).expect("offload");
    (in_flight, extents.remove(0))
}

fn wait_for(stream: &StreamRef, before: &StreamRef) {
    stream.wait(&before.record().expect("event")).expect("wait");
}

fn a_stream_keeps_its_order(rig: &dyn Rig) {
    let (stream, range) = (rig.stream(), rig.device_memory(5000));
    rig.fill(&stream, &range, 7);
    let mut expected = vec![7; 5000];
    for value in [1, 200, 33] {
        rig.linger(&stream);
        rig.fold(&stream, &range, value);
        expected = folded(&expected, value);
    }
    let (_in_flight, extent) = send_out(&stream, &range, rig.extent(5000));
    rig.fill(&stream, &range, 9);
    assert_eq!(extent.as_slice().expect("bytes"), expected);
    stream.synchronize().expect("synchronise");
    assert_eq!(rig.read(&range), vec![9; 5000]);
}

fn bytes_come_back_whatever_their_number(rig: &dyn Rig) {
    let (out, back) = (rig.stream(), rig.stream());
    for bytes in [0, 1, 511, 4096, 100_003] {
        let (source, destination) = (rig.device_memory(bytes), rig.device_memory(bytes));
        let expected = rig.content(bytes as u64, bytes);
        rig.write(&source, &expected);
        let (gone, extent) = send_out(&out, &source, rig.extent(bytes));
        assert_eq!(gone.bytes(), bytes);
        let returned = onboard(&back, vec![(destination.clone(), extent)]).expect("onboard");
        returned.event().synchronize().expect("event");
        assert!(returned.is_done().expect("event"));
        assert_eq!(rig.read(&destination), expected, "{bytes} bytes");
    }
}

fn a_batch_moves_every_piece(rig: &dyn Rig) {
    const PIECES: usize = 96;
    let (out, back) = (rig.stream(), rig.stream());
    let (source, destination) = (rig.device_memory(PIECES * 300), rig.device_memory(PIECES * 300));
    let expected = rig.content(1, PIECES * 300);
    rig.write(&source, &expected);
    rig.write(&destination, &vec![0; PIECES * 300]);
    let slab = rig.slab(PIECES * 300);
    let mut pairs = Vec::new();
    let mut places = Vec::new();
    for piece in 0..PIECES {
        let place = piece * 300..piece * 300 + piece * 3; // the first is empty
        pairs.push((source.slice(place.clone()).expect("inside"), slab.claim(place.clone()).expect("free")));
        places.push(place);
    }
    let (gone, extents) = offload(&out, pairs).expect("offload");
    assert_eq!(gone.bytes(), places.iter().map(|place| place.len()).sum::<usize>());
    let pairs = places.iter().map(|place| destination.slice(place.clone()).expect("inside")).zip(extents);
    onboard(&back, pairs.collect()).expect("onboard").event().synchronize().expect("event");
    let found = rig.read(&destination);
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let moved = places[at / 300].contains(&at);
        assert_eq!(*found, if moved { *expected } else { 0 }, "byte {at}");
    }
}

fn a_stream_waits_for_another(rig: &dyn Rig) {
    let (first, second) = (rig.stream(), rig.stream());
    let range = rig.device_memory(3000);
    let mut expected = rig.content(2, 3000);
    rig.write(&range, &expected);
    for value in 0..6 {
        let (now, next) = if value % 2 == 0 { (&first, &second) } else { (&second, &first) };
        rig.linger(now);
        rig.fold(now, &range, value);
        wait_for(next, now);
        expected = folded(&expected, value);
    }
    first.synchronize().expect("synchronise");
    assert_eq!(rig.read(&range), expected);
}

fn an_event_passes_once_and_has_a_time(rig: &dyn Rig) {
    let stream = rig.stream();
    let events: Vec<_> = (0..4)
        .map(|_| {
            rig.linger(&stream);
            stream.record().expect("event")
        })
        .collect();
    events[3].synchronize().expect("synchronise");
    let mut last_us = f64::MIN;
    for event in events {
        assert!(event.is_done().expect("event"), "those before a passed event have passed");
        let time_us = event.time_us().expect("time");
        assert!(time_us >= last_us, "{time_us} after {last_us}");
        last_us = time_us;
    }
    assert!(rig.device().now_us() >= 0.0);
}

fn the_host_waits_for_the_copy_that_fills_an_extent(rig: &dyn Rig) {
    let (stream, range) = (rig.stream(), rig.device_memory(70_000));
    rig.linger(&stream);
    rig.fill(&stream, &range, 0x42);
    let (in_flight, extent) = send_out(&stream, &range, rig.extent(70_000));
    assert_eq!(extent.as_slice().expect("bytes"), vec![0x42; 70_000]);
    drop(in_flight);
    let mut extent = Arc::into_inner(extent).expect("the copy has given it up");
    extent.as_mut_slice().expect("bytes").fill(1);
    assert_eq!(extent.as_slice().expect("bytes"), vec![1; 70_000]);
}

fn onboarding_waits_for_the_offload_of_its_extent(rig: &dyn Rig) {
    let (compute, out, back) = (rig.stream(), rig.stream(), rig.stream());
    let (source, destination) = (rig.device_memory(9000), rig.device_memory(9000));
    rig.linger(&compute);
    rig.fill(&compute, &source, 0x33);
    wait_for(&out, &compute);
    let (_gone, extent) = send_out(&out, &source, rig.extent(9000));
    let returned = onboard(&back, vec![(destination.clone(), extent)]).expect("onboard");
    wait_for(&compute, &back);
    rig.fold(&compute, &destination, 5);
    drop(returned);
    compute.synchronize().expect("synchronise");
    assert_eq!(rig.read(&destination), folded(&[0x33; 9000], 5));
}

fn a_lease_on_the_source_outlives_its_owner(rig: &dyn Rig) {
    let stream = rig.stream();
    let source = rig.device_memory(8192);
    let expected = rig.content(3, 8192);
    rig.write(&source, &expected);
    rig.linger(&stream);
    let (in_flight, extent) = send_out(&stream, &source, rig.extent(8192));
    drop(source);
    // Whoever gets the memory next may write it at once.
    let next = rig.device_memory(8192);
    rig.write(&next, &[0xEE; 8192]);
    drop(in_flight);
    assert_eq!(extent.as_slice().expect("bytes"), expected);
}

fn a_released_source_may_be_overwritten_in_order(rig: &dyn Rig) {
    let (compute, out) = (rig.stream(), rig.stream());
    let source = rig.device_memory(8192);
    rig.fill(&compute, &source, 0x21);
    wait_for(&out, &compute);
    rig.linger(&out);
    let (mut in_flight, extent) = send_out(&out, &source, rig.extent(8192));
    release_on(&compute, &mut in_flight);
    rig.fill(&compute, &source, 0xEE);
    assert_eq!(extent.as_slice().expect("bytes"), vec![0x21; 8192]);
    compute.synchronize().expect("synchronise");
    assert_eq!(rig.read(&source), vec![0xEE; 8192]);
}

fn an_extent_is_not_reused_under_a_copy(rig: &dyn Rig) {
    let (out, back) = (rig.stream(), rig.stream());
    let slab = rig.slab(4096);
    let source = rig.device_memory(4096);
    for round in 0..4 {
        let expected = rig.content(round, 4096);
        rig.write(&source, &expected);
        let (gone, extent) = send_out(&out, &source, slab.claim(0..4096).expect("came back"));
        let destination = rig.device_memory(4096);
        rig.linger(&back);
        let returned = onboard(&back, vec![(destination.clone(), extent)]).expect("onboard");
        drop(gone);
        assert!(slab.claim(0..1).is_err(), "a copy still reads it");
        drop(returned);
        let mut reused = slab.claim(0..4096).expect("came back");
        reused.as_mut_slice().expect("bytes").fill(0xEE);
        assert_eq!(rig.read(&destination), expected, "round {round}");
    }
}

fn claims_are_disjoint_and_come_back(rig: &dyn Rig) {
    let slab = rig.slab(1000);
    assert_eq!(slab.bytes(), 1000);
    let first = slab.claim(100..200).expect("free");
    let second = slab.claim(200..300).expect("free");
    for taken in [100..200, 199..201, 0..101, 0..1000, 299..300, 150..160] {
        let refused = slab.claim(taken.clone()).expect_err("taken");
        assert!(matches!(refused, Error::BadRange { what: "claimed already", .. }), "{taken:?}: {refused}");
    }
    for outside in [0..1001, 1000..1001, usize::MAX - 1..usize::MAX] {
        let refused = slab.claim(outside.clone()).expect_err("outside");
        assert!(matches!(refused, Error::BadRange { what: "out of bounds", .. }), "{outside:?}: {refused}");
    }
    #[expect(clippy::reversed_empty_ranges, reason = "a range that a caller got wrong")]
    let reversed = slab.claim(20..10);
    assert!(reversed.is_err());
    assert_eq!((first.offset(), first.bytes(), second.addr() - first.addr()), (100, 100, 100));
    drop(first);
    drop(slab.claim(0..200).expect("came back"));
    assert_eq!(slab.claim(1000..1000).expect("empty").as_slice().expect("bytes"), b"");
}

fn sizes_that_differ_are_refused(rig: &dyn Rig) {
    let (stream, slab) = (rig.stream(), rig.slab(100));
    let range = rig.device_memory(101);
    let refused = offload(&stream, vec![(range.clone(), slab.claim(0..100).expect("free"))]).err();
    assert_eq!(refused, Some(Error::SizeMismatch { src_bytes: 101, dst_bytes: 100 }));
    let extent = Arc::new(slab.claim(0..100).expect("came back"));
    let refused = onboard(&stream, vec![(range.clone(), extent)]).err();
    assert_eq!(refused, Some(Error::SizeMismatch { src_bytes: 100, dst_bytes: 101 }));
    drop(slab.claim(0..100).expect("came back"));
    assert!(matches!(range.slice(50..102), Err(Error::BadRange { start: 50, end: 102, bytes: 101, .. })));
}

fn too_much_memory_is_an_error(rig: &dyn Rig) {
    const TOO_MUCH: usize = 1 << 60;
    let device = rig.device();
    let refused = device.alloc_device(TOO_MUCH).expect_err("more than any machine has");
    assert!(
        matches!(refused, Error::OutOfMemory { tier: "device", requested_bytes: TOO_MUCH, .. }),
        "{refused}"
    );
    let refused = device.alloc_host(TOO_MUCH).err().expect("more than any machine has");
    assert!(
        matches!(refused, Error::OutOfMemory { tier: "host", requested_bytes: TOO_MUCH, .. }),
        "{refused}"
    );
    bytes_come_back_whatever_their_number(rig);
}

fn queued_jobs_keep_their_order_and_may_copy(rig: &dyn Rig) {
    let queue = rig.device().new_queue("jobs").expect("queue");
    let (out, source) = (rig.stream(), rig.device_memory(2000));
    let expected = rig.content(4, 2000);
    rig.write(&source, &expected);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let gate = Arc::new(Gate::new());
    let extent = rig.extent(2000);
    let (notes, range, stream) = (Arc::clone(&seen), source.clone(), Arc::clone(&out));
    queue.push(Box::new(move || {
        let (in_flight, extent) = send_out(&stream, &range, extent);
        drop(in_flight);
        notes.lock().expect("notes").push(extent.as_slice().expect("bytes").to_vec());
    }));
    for number in 0..5 {
        let notes = Arc::clone(&seen);
        queue.push(Box::new(move || notes.lock().expect("notes").push(vec![number])));
    }
    let last = Arc::clone(&gate);
    queue.push(Box::new(move || last.open()));
    rig.device().block_on(&gate).expect("opens");
    let mut whole = vec![expected];
    whole.extend((0..5).map(|number| vec![number]));
    assert_eq!(*seen.lock().expect("notes"), whole);
}

fn a_wrapped_stream_takes_part(rig: &dyn Rig) {
    let (own, wrapped) = (rig.stream(), rig.device().wrap_stream(0).expect("the default stream"));
    let range = rig.device_memory(3000);
    rig.linger(&own);
    rig.fill(&own, &range, 0x66);
    wait_for(&wrapped, &own);
    let (out, extent) = send_out(&wrapped, &range, rig.extent(3000));
    let back = rig.device_memory(3000);
    wait_for(&own, &wrapped);
    onboard(&own, vec![(back.clone(), Arc::clone(&extent))])
        .expect("onboard")
        .event()
        .synchronize()
        .expect("event");
    drop(out);
    assert_eq!(rig.read(&back), vec![0x66; 3000]);
    assert_eq!(extent.as_slice().expect("bytes"), vec![0x66; 3000]);
    wrapped.synchronize().expect("synchronise");
    drop(wrapped);
    rig.device().wrap_stream(0).expect("still there").synchronize().expect("synchronise");
}

/// Random work on random streams, each step ordered behind the last one on the same memory.
fn many_streams_at_once(rig: &dyn Rig) {
    const BYTES: usize = 1024;
    let mut rng = fastrand::Rng::with_seed(rig.seed());
    let streams: Vec<StreamRef> = (0..6).map(|_| rig.stream()).collect();
    let tensors: Vec<DeviceRange> = (0..4).map(|_| rig.device_memory(BYTES)).collect();
    let mut model: Vec<Vec<u8>> = (0..4).map(|salt| rig.content(salt, BYTES)).collect();
    for (tensor, content) in tensors.iter().zip(&model) {
        rig.write(tensor, content);
    }
    let mut last: Vec<Option<overspill_device::EventRef>> = vec![None; 4];
    let slab = rig.slab(8 * BYTES);
    let mut under_way: Vec<InFlight> = Vec::new();
    for step in 0..60 {
        let (stream, which) = (&streams[rng.usize(..6)], rng.usize(..4));
        if let Some(event) = &last[which] {
            stream.wait(event).expect("wait");
        }
        if rng.bool() {
            rig.fold(stream, &tensors[which], step);
            model[which] = folded(&model[which], step);
        } else {
            let place = rng.usize(..8) * BYTES;
            let Ok(extent) = slab.claim(place..place + BYTES) else { continue };
            let (gone, extent) = send_out(stream, &tensors[which], extent);
            rig.fill(stream, &tensors[which], 0xEE);
            let back = &streams[rng.usize(..6)];
            wait_for(back, stream);
            under_way.extend([gone, onboard(back, vec![(tensors[which].clone(), extent)]).expect("onboard")]);
            last[which] = Some(back.record().expect("event"));
            if rng.bool() {
                drop(under_way.remove(rng.usize(..under_way.len())));
            }
            continue;
        }
        last[which] = Some(stream.record().expect("event"));
    }
    for stream in &streams {
        stream.synchronize().expect("synchronise");
    }
    for (which, tensor) in tensors.iter().enumerate() {
        assert_eq!(rig.read(tensor), model[which], "tensor {which}");
    }
    drop(under_way);
    slab.claim(0..8 * BYTES).expect("every extent came back");
}

fn everything_may_be_dropped_at_any_time(rig: &dyn Rig) {
    let stream = rig.stream();
    let slab = rig.slab(4096);
    let extent = slab.claim(0..4096).expect("free");
    drop(slab);
    let range = rig.device_memory(4096);
    rig.linger(&stream);
    rig.fill(&stream, &range, 3);
    let (in_flight, extents) = offload(&stream, vec![(range.clone(), extent)]).expect("offload");
    let event = Arc::clone(in_flight.event());
    drop(stream);
    drop(extents);
    drop(in_flight);
    assert!(event.is_done().expect("event"), "dropping a copy in flight waits for it");
    assert_eq!(rig.read(&range), vec![3; 4096]);
}
