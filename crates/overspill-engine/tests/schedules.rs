//! The engine under thousands of seeded schedules, with faults, and with bugs planted below it.
//!
//! Every failure names its seed. The model: a stack of device tensors is offloaded, each one's
//! memory is given up, and all come back in reverse order into fresh memory, as in backward.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use overspill_device::{
    Device, DeviceRef,
    sim::{Planted, SimConfig, SimDevice},
};
use overspill_engine::{
    Cause, Engine, EngineConfig, Error, SpillFile, Tier,
    storage::{DirectFile, Fault, FaultyStorage},
};

const SCHEDULES: u64 = 2_000;

fn config(rng: &mut fastrand::Rng) -> EngineConfig {
    EngineConfig {
        host_budget_bytes: rng.usize(4..24) * 4096,
        slab_bytes: rng.usize(1..8) * 4096,
        segment_bytes: rng.usize(1..4) * 4096,
        spill: None,
        trace: rng.bool(),
    }
}

fn spill_file(fault: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static) -> SpillFile {
    let file = DirectFile::create_in(&std::env::temp_dir()).expect("temporary folder");
    SpillFile::on(Box::new(FaultyStorage::new(file, fault)), 1 << 20)
}

/// What the bytes of tensor `index` are.
fn content(seed: u64, index: usize, bytes: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed * 1000 + index as u64);
    (0..bytes).map(|_| rng.u8(..)).collect()
}

/// One step on one schedule; an error of the engine, or what was wrong about the bytes.
fn step(seed: u64, planted: Planted, spill: Option<SpillFile>) -> Result<(), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let device = SimDevice::seeded(SimConfig { seed, planted, ..SimConfig::default() });
    let shared: DeviceRef = Arc::clone(&device) as DeviceRef;
    let engine = Engine::with_spill_file(shared, config(&mut rng), spill).map_err(|e| e.to_string())?;
    let compute = device.new_sim_queue("compute").map_err(|e| e.to_string())?;
    let compute_ref: overspill_device::StreamRef = compute.clone();
    let count = rng.usize(1..8);
    let (mut slots, mut kept) = (Vec::new(), Vec::new());
    for index in 0..count {
        let bytes = rng.usize(1..20_000);
        let tensor = device.alloc_device(bytes).map_err(|e| e.to_string())?;
        let (writer, target, data) = (Arc::clone(&device), tensor.clone(), content(seed, index, bytes));
        compute.launch(move || writer.write(&target, &data));
        let slot = engine.offload(&tensor, &compute_ref, Cause::Offload).map_err(|e| e.to_string())?;
        if rng.bool() {
            engine.release_source(&slot, &compute_ref).map_err(|e| e.to_string())?;
            // Whatever reuses the memory in the order of the compute stream may write from here on,
            // and it is freed in that order, as PyTorch's allocator does.
            let writer = Arc::clone(&device);
            compute.launch(move || writer.write(&tensor, &vec![0xEE; tensor.bytes()]));
        } else {
            // A later release gives up this lease as well, in compute's order; this device would
            // free the memory in the host's.
            kept.push(tensor);
        }
        slots.push(slot);
    }
    for (index, slot) in slots.iter().enumerate().rev() {
        let buffer = device.alloc_device(slot.bytes()).map_err(|e| e.to_string())?;
        if rng.bool() {
            // Compute still uses what was in this memory before.
            let (writer, target) = (Arc::clone(&device), buffer.clone());
            compute.launch(move || writer.write(&target, &vec![0xAA; target.bytes()]));
        }
        let cause = if rng.bool() { Cause::Prefetch } else { Cause::OnDemand };
        let back = engine.onboard(slot, &buffer, &compute_ref, cause).map_err(|e| e.to_string())?;
        if rng.u8(..) < 32 {
            drop(back); // an abandoned graph
            continue;
        }
        back.wait_on(&compute_ref).map_err(|e| e.to_string())?;
        let (found, reader) = (Arc::new(std::sync::Mutex::new(Vec::new())), Arc::clone(&device));
        let into = Arc::clone(&found);
        compute.launch(move || *into.lock().expect("not poisoned") = reader.read(&buffer));
        overspill_device::Stream::synchronize(&*compute).map_err(|e| e.to_string())?;
        let (found, expected) = (found.lock().expect("not poisoned"), content(seed, index, slot.bytes()));
        let wrong = |at: &usize| found[*at] != expected[*at];
        if let Some(first) = (0..expected.len()).find(wrong) {
            let (count, byte) = ((0..expected.len()).filter(wrong).count(), found[first]);
            let what = format!("{count} of {} bytes, the first at {first}, {byte:#04x}", expected.len());
            return Err(format!("tensor {index} came back changed: {what}"));
        }
    }
    drop(slots);
    engine.drain().map_err(|e| e.to_string())?;
    match (engine.pool_counters().bytes_in_use, engine.disk_bytes()) {
        (0, 0) => Ok(()),
        left => Err(format!("left behind (host, disk): {left:?}")),
    }
}

#[test]
fn every_schedule_returns_the_same_bytes_and_all_memory() {
    for seed in 0..SCHEDULES {
        let spill = (seed % 2 == 0).then(|| spill_file(|_| None));
        let without_disk = spill.is_none();
        match step(seed, Planted::Nothing, spill) {
            Ok(()) => {}
            Err(error) if without_disk && error.contains("host tier is full") => {}
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
}

/// The share of schedules on which a planted bug shows, as a wrong byte, an error or a panic.
fn caught(planted: Planted) -> usize {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let caught = (0..200)
        .filter(|&seed| {
            let ran = catch_unwind(AssertUnwindSafe(|| step(seed, planted, Some(spill_file(|_| None)))));
            !matches!(ran, Ok(Ok(())))
        })
        .count();
    std::panic::set_hook(hook);
    caught
}

#[test]
fn leases_given_up_before_their_event_are_caught() {
    assert!(caught(Planted::EventsPassEarly) > 20);
}

#[test]
fn a_stream_that_does_not_wait_is_caught() {
    assert!(caught(Planted::StreamWaitsIgnored) > 20);
}

/// The edges of docs/stream-ordering.md that are waits between streams, each removed alone.
#[test]
fn every_wait_between_streams_is_needed() {
    for (by, on) in [
        ("offload", "compute"),
        ("compute", "offload"),
        ("onboard", "offload"),
        ("onboard", "compute"),
        ("compute", "onboard"),
    ] {
        let found = caught(Planted::WaitIgnored { by, on });
        eprintln!("{by} does not wait for {on}: caught on {found} of 200 schedules");
        assert!(found > 0, "{by} does not wait for {on}: caught on {found} schedules");
    }
}

#[test]
fn disk_faults_are_typed_errors_or_right_bytes() {
    let (mut failed, mut passed) = (0, 0);
    for seed in 0..SCHEDULES / 4 {
        let fault =
            [Fault::NoSpace, Fault::ShortWrite, Fault::ReadError, Fault::BitFlip][(seed % 4) as usize];
        let at = seed / 4 % 12;
        match step(seed, Planted::Nothing, Some(spill_file(move |n| (n == at).then_some(fault)))) {
            Ok(()) => passed += 1,
            Err(error) if error.contains("came back changed") || error.contains("left behind") => {
                panic!("seed {seed}, {fault:?} at {at}: {error}")
            }
            Err(_) => failed += 1,
        }
    }
    assert!(failed > 50 && passed > 50, "{failed} failed, {passed} passed");
}

#[test]
fn a_full_disk_leaves_what_was_offloaded_where_it_was() {
    let device = SimDevice::threads();
    let shared: DeviceRef = Arc::clone(&device) as DeviceRef;
    let config = EngineConfig {
        host_budget_bytes: 4 * 4096,
        slab_bytes: 4 * 4096,
        segment_bytes: 4096,
        ..EngineConfig::default()
    };
    let engine =
        Engine::with_spill_file(shared, config, Some(spill_file(|_| Some(Fault::NoSpace)))).expect("engine");
    let compute = device.wrap_stream(0).expect("stream");
    let tensor = device.alloc_device(2 * 4096).expect("device memory");
    device.write(&tensor, &content(1, 0, 2 * 4096));
    let first = engine.offload(&tensor, &compute, Cause::Offload).expect("fits in host memory");
    let large = device.alloc_device(8 * 4096).expect("device memory");
    let error = engine.offload(&large, &compute, Cause::Offload).err().expect("no room");
    assert!(
        matches!(error, Error::Io { operation: "write", .. } | Error::Full { tier: Tier::Host, .. }),
        "{error}"
    );
    let back = device.alloc_device(2 * 4096).expect("device memory");
    let onboarding = engine.onboard(&first, &back, &compute, Cause::OnDemand).expect("still there");
    onboarding.wait_on(&compute).expect("still there");
    assert_eq!(device.read(&back), content(1, 0, 2 * 4096));
}

#[test]
fn a_size_that_differs_is_refused() {
    let device = SimDevice::threads();
    let shared: DeviceRef = Arc::clone(&device) as DeviceRef;
    let engine = Engine::new(shared, EngineConfig::default()).expect("engine");
    let compute = device.wrap_stream(0).expect("stream");
    let tensor = device.alloc_device(100).expect("device memory");
    let slot = engine.offload(&tensor, &compute, Cause::Offload).expect("room");
    let wrong = device.alloc_device(99).expect("device memory");
    let refused = engine.onboard(&slot, &wrong, &compute, Cause::OnDemand).err().expect("refused");
    assert!(matches!(refused, Error::SizeMismatch { slot_bytes: 100, destination_bytes: 99 }));
}

#[test]
fn an_unusable_spill_folder_says_so() {
    let spill =
        overspill_engine::SpillConfig { dir: "/does/not/exist".into(), limit_bytes: 4096, eager: true };
    let config = EngineConfig { spill: Some(spill), ..EngineConfig::default() };
    let error = Engine::new(SimDevice::threads(), config).err().expect("refused");
    assert!(error.to_string().contains("/does/not/exist"), "{error}");
}
