//! The simulated device: the conformance suite on threads and under seeded schedules, and proof that
//! the suite finds the bugs it is there for.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{CASES, EDGES, Rig, SimRig, with_seed};
use overspill_device::{
    Error, Gate,
    sim::{Planted, SimConfig},
};

const SCHEDULES: u64 = 1_000;

#[test]
fn on_threads() {
    for (name, case) in CASES {
        eprintln!("{name}");
        case(&SimRig::threads());
    }
    for (name, edge) in EDGES {
        assert!(edge(&SimRig::threads(), true), "{name}");
    }
}

#[test]
fn under_seeded_schedules() {
    for (name, case) in CASES {
        eprintln!("{name}");
        for seed in 0..SCHEDULES {
            with_seed(seed, || case(&SimRig::seeded(SimConfig { seed, ..SimConfig::default() })));
        }
    }
}

#[test]
fn every_edge_is_needed_and_is_there() {
    for (name, edge) in EDGES {
        let right = |edge_is_there: bool| {
            (0..SCHEDULES)
                .filter(|&seed| {
                    let rig = SimRig::seeded(SimConfig { seed, ..SimConfig::default() });
                    edge(&rig, edge_is_there)
                })
                .count() as u64
        };
        assert_eq!(right(true), SCHEDULES, "{name}: with the edge, on some schedule");
        let wrong = SCHEDULES - right(false);
        eprintln!("{name}: wrong bytes on {wrong} of {SCHEDULES} schedules without it");
        assert!(wrong > SCHEDULES / 100, "{name}: hardly a schedule shows that it is needed");
    }
}

/// Names of the cases that notice a planted bug on some schedule.
fn noticed(planted: Planted) -> Vec<&'static str> {
    let noticing = CASES.iter().filter(|(_, case)| {
        (0..60).any(|seed| {
            let run = || case(&SimRig::seeded(SimConfig { seed, planted, ..SimConfig::default() }));
            catch_unwind(AssertUnwindSafe(run)).is_err()
        })
    });
    noticing.map(|(name, _)| *name).collect()
}

#[test]
fn planted_bugs_are_noticed() {
    let early = noticed(Planted::EventsPassEarly);
    for name in [
        "the_host_waits_for_the_copy_that_fills_an_extent",
        "a_lease_on_the_source_outlives_its_owner",
        "an_extent_is_not_reused_under_a_copy",
    ] {
        assert!(early.contains(&name), "{name} misses events that pass early; noticed by {early:?}");
    }
    let deaf = noticed(Planted::StreamWaitsIgnored);
    for name in [
        "a_stream_waits_for_another",
        "onboarding_waits_for_the_offload_of_its_extent",
        "a_released_source_may_be_overwritten_in_order",
        "many_streams_at_once",
    ] {
        assert!(deaf.contains(&name), "{name} misses waits that are ignored; noticed by {deaf:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_timeline() {
    let timeline = |seed| {
        let rig = SimRig::seeded(SimConfig { seed, ..SimConfig::default() });
        let (one, other) = (rig.stream(), rig.stream());
        let events: Vec<_> = (0..20)
            .map(|number| {
                let stream = if number % 3 == 0 { &one } else { &other };
                rig.fill(stream, &rig.device_memory(10), number);
                stream.record().expect("event")
            })
            .collect();
        one.synchronize().expect("synchronise");
        other.synchronize().expect("synchronise");
        events.iter().map(|event| event.time_us().expect("time")).collect::<Vec<_>>()
    };
    assert_eq!(timeline(7), timeline(7));
    assert!((0..20).any(|seed| timeline(seed) != timeline(7)));
}

#[test]
fn a_wait_that_cannot_end_is_an_error_with_the_seed() {
    let rig = SimRig::seeded(SimConfig { seed: 42, ..SimConfig::default() });
    let refused = rig.device().block_on(&Gate::new()).expect_err("nobody opens it");
    assert_eq!(refused, Error::Deadlock { seed: 42 });
}

#[test]
fn allocations_fail_where_asked_and_by_chance() {
    for tier in ["device", "host"] {
        let rig = SimRig::seeded(SimConfig { fail_allocation: Some(1), ..SimConfig::default() });
        let alloc = || match tier {
            "device" => rig.device().alloc_device(10).err(),
            _ => rig.device().alloc_host(10).err(),
        };
        let refused = Error::OutOfMemory { tier, requested_bytes: 10, available_bytes: 0 };
        assert_eq!([alloc(), alloc(), alloc()], [None, Some(refused), None]);
    }
    let config = SimConfig { seed: 1, fail_one_allocation_in: Some(4), ..SimConfig::default() };
    let rig = SimRig::seeded(config);
    let failed = (0..400).filter(|_| rig.device().alloc_device(1).is_err()).count();
    assert!((50..150).contains(&failed), "{failed} of 400");
}

#[test]
fn freed_and_returned_memory_is_poisoned() {
    let rig = SimRig::seeded(SimConfig::default());
    let slab = rig.slab(64);
    let mut extent = slab.claim(0..64).expect("free");
    extent.as_mut_slice().expect("bytes").fill(5);
    drop(extent);
    let returned = slab.claim(0..64).expect("came back");
    assert_eq!(returned.as_slice().expect("bytes"), [0xDB; 64]);
}
