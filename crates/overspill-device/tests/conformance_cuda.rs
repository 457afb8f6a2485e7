//! The CUDA device: the conformance suite, the edges, and what only a GPU has.
//!
//! A machine without a GPU leaves all of it out and says how much; with `OVERSPILL_REQUIRE_GPU=1`
//! that is a failure. Arguments that are not flags select tests by a part of their name.

mod common;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
};

use common::{CASES, CudaRig, EDGES, Rig};
use overspill_device::{
    DeviceRef, Error,
    cuda::{Arg, CudaConfig, CudaDevice, HostMemory, Launch},
    kernels,
    nvrtc::{Nvrtc, cache::KernelCache},
    offload, onboard,
};

type Test = Box<dyn Fn(&Nvrtc)>;

fn configurations() -> Vec<(&'static str, CudaConfig)> {
    let default = CudaConfig::default();
    let of = |host_memory| CudaConfig { host_memory, ..default };
    vec![
        ("registered", of(HostMemory::Registered)),
        ("allocated", of(HostMemory::Allocated)),
        ("pageable", of(HostMemory::Pageable)),
        ("one by one", CudaConfig { batch_copies: false, ..default }),
    ]
}

fn tests() -> Vec<(String, Test)> {
    let mut tests: Vec<(String, Test)> = Vec::new();
    for (kind, config) in configurations() {
        for &(name, case) in CASES {
            let run = move |nvrtc: &Nvrtc| {
                let rig = CudaRig::open(config, nvrtc, 1).expect("device");
                case(&rig);
                for kind in [HostMemory::Registered, HostMemory::Allocated, HostMemory::Pageable] {
                    assert_eq!(rig.cuda.host_counters().bytes(kind), 0, "{kind:?} memory left behind");
                }
            };
            tests.push((format!("{name} ({kind})"), Box::new(run)));
        }
    }
    for &(name, edge) in EDGES {
        let with = move |nvrtc: &Nvrtc| {
            let rig = CudaRig::open(CudaConfig::default(), nvrtc, 1).expect("device");
            assert!((0..5).all(|_| edge(&rig, true)), "wrong bytes");
        };
        let without = move |nvrtc: &Nvrtc| {
            let rig = CudaRig::open(CudaConfig::default(), nvrtc, 1).expect("device");
            assert!((0..5).any(|_| !edge(&rig, false)), "nothing shows that the edge is needed");
        };
        tests.push((format!("edge {name}: there"), Box::new(with)));
        tests.push((format!("edge {name}: needed"), Box::new(without)));
    }
    tests.push(("kernels_agree_with_the_host".to_owned(), Box::new(kernels_agree_with_the_host)));
    tests.push(("gpu_compares_what_came_back".to_owned(), Box::new(gpu_compares_what_came_back)));
    tests.push(("many_small_copies_in_batches".to_owned(), Box::new(many_small_copies_in_batches)));
    tests.push(("events_have_the_time_of_the_work".to_owned(), Box::new(events_have_the_time_of_the_work)));
    tests.push(("an_unknown_device_is_refused".to_owned(), Box::new(an_unknown_device_is_refused)));
    tests
}

fn kernels_agree_with_the_host(nvrtc: &Nvrtc) {
    let rig = CudaRig::open(CudaConfig::default(), nvrtc, 3).expect("device");
    let (stream, content) = (rig.stream(), rig.content(0, 1_000_001));
    let (range, copied) = (rig.device_memory(content.len()), rig.device_memory(content.len()));
    rig.write(&range, &content);
    rig.fold(&stream, &range, 17);
    rig.copy(&stream, &copied, &range);
    stream.synchronize().expect("synchronise");
    assert_eq!(rig.read(&copied), common::folded(&content, 17));
}

fn gpu_compares_what_came_back(nvrtc: &Nvrtc) {
    const BYTES: usize = 64 << 20;
    let rig = CudaRig::open(CudaConfig::default(), nvrtc, 5).expect("device");
    let module = rig.cuda.build(nvrtc, &KernelCache::of_user(), &kernels::MEMORY).expect("module");
    let count_differing = module.kernel("count_differing").expect("kernel");
    let (stream, source, back) = (rig.stream(), rig.device_memory(BYTES), rig.device_memory(BYTES));
    let count = rig.device_memory(8);
    rig.write(&source, &rig.content(0, BYTES));
    let (gone, extents) = offload(&stream, vec![(source.clone(), rig.extent(BYTES))]).expect("offload");
    let returned = onboard(&stream, vec![(back.clone(), Arc::clone(&extents[0]))]).expect("onboard");
    for expected in [0, 1] {
        rig.fill(&stream, &count, 0);
        let [left, right, to] = [&source, &back, &count].map(|range| Arg::U64(range.addr()));
        let args = [left, right, Arg::U64(BYTES as u64), to];
        // SAFETY: the kernel's parameters; the ranges live until the synchronisation.
        unsafe { count_differing.launch(&*stream, Launch::linear(1024, 256), &args) }.expect("launch");
        stream.synchronize().expect("synchronise");
        assert_eq!(rig.read(&count), u64::to_le_bytes(expected));
        let last = back.slice(BYTES - 1..BYTES).expect("inside");
        rig.write(&last, &[rig.read(&last)[0] ^ 1]);
    }
    drop((gone, returned));
}

fn many_small_copies_in_batches(nvrtc: &Nvrtc) {
    const PIECES: usize = 4096;
    let rig = CudaRig::open(CudaConfig::default(), nvrtc, 6).expect("device");
    let (stream, content) = (rig.stream(), rig.content(0, PIECES * 64));
    let (source, slab) = (rig.device_memory(content.len()), rig.slab(content.len()));
    rig.write(&source, &content);
    let pairs = (0..PIECES).map(|piece| {
        // Backwards, so that a batch taken for one run would show.
        let (from, to) = (piece * 64, (PIECES - 1 - piece) * 64);
        (source.slice(from..from + 64).expect("inside"), slab.claim(to..to + 64).expect("free"))
    });
    let (gone, extents) = offload(&stream, pairs.collect()).expect("offload");
    for (piece, extent) in extents.iter().enumerate() {
        assert_eq!(extent.as_slice().expect("bytes"), &content[piece * 64..piece * 64 + 64]);
    }
    drop(gone);
    eprint!("[batch copies: {}] ", rig.cuda.has_batch_copies());
}

fn events_have_the_time_of_the_work(nvrtc: &Nvrtc) {
    let rig = CudaRig::open(CudaConfig::default(), nvrtc, 7).expect("device");
    let device: &DeviceRef = rig.device();
    let stream = rig.stream();
    let before_us = device.now_us();
    let start = stream.record().expect("event");
    rig.linger(&stream);
    let end = stream.record().expect("event");
    end.synchronize().expect("synchronise");
    let (start_us, end_us) = (start.time_us().expect("time"), end.time_us().expect("time"));
    // The spin kernel counts the device's own nanoseconds: at least these have passed.
    assert!(end_us - start_us >= 2_900.0, "3 ms of spinning took {} us", end_us - start_us);
    eprint!(
        "[spin {:.0} us; event {:.0} us after the host's clock] ",
        end_us - start_us,
        start_us - before_us
    );
}

fn an_unknown_device_is_refused(_nvrtc: &Nvrtc) {
    let refused = CudaDevice::open(CudaConfig { ordinal: 4096, ..CudaConfig::default() }).err();
    assert!(matches!(refused, Some(Error::Unavailable { backend: "cuda", .. })), "{refused:?}");
}

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let selected = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let tests: Vec<_> = tests().into_iter().filter(|(name, _)| selected(name)).collect();
    let required = std::env::var_os("OVERSPILL_REQUIRE_GPU").is_some_and(|value| value == "1");
    let opened = CudaDevice::open(CudaConfig::default()).and_then(|device| Ok((device, Nvrtc::find(None)?)));
    let (_kept_open, nvrtc) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            println!("{} tests left out: {error}", tests.len());
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let mut failed = Vec::new();
    for (name, test) in &tests {
        eprint!("test {name} ... ");
        let passed = catch_unwind(AssertUnwindSafe(|| test(&nvrtc))).is_ok();
        eprintln!("{}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(name);
        }
    }
    println!("{} tests passed, {} failed: {failed:?}", tests.len() - failed.len(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
