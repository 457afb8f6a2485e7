//! The cross-stream edges of a transfer, each one with and without.
//!
//! With an edge the library's own leases and waits are used where it is the library that has them;
//! without, raw copies that lack just that edge. `docs/stream-ordering.md` lists the same edges.

use std::sync::Arc;

use overspill_device::{DeviceRange, Direction, HostExtent, RawCopy, StreamRef, offload, onboard};

use super::{Rig, release_on};

/// Runs a transfer with or without one edge; whether the bytes are right. Nothing is under way when
/// it returns.
pub type Edge = fn(&dyn Rig, bool) -> bool;

/// Every edge and its name.
pub const EDGES: &[(&str, Edge)] = &[
    ("offload_waits_for_compute", offload_waits_for_compute),
    ("readers_of_an_extent_wait_for_its_offload", readers_of_an_extent_wait_for_its_offload),
    ("onboard_waits_until_its_destination_is_free", onboard_waits_until_its_destination_is_free),
    ("compute_waits_for_onboard", compute_waits_for_onboard),
    ("an_extent_is_reused_behind_its_readers", an_extent_is_reused_behind_its_readers),
    ("a_source_is_reused_behind_its_offload", a_source_is_reused_behind_its_offload),
];

const BYTES: usize = 20_000;
const OLD: u8 = 0x11;
const NEW: u8 = 0x77;

struct Setup {
    compute: StreamRef,
    out: StreamRef,
    back: StreamRef,
    source: DeviceRange,
    destination: DeviceRange,
}

impl Setup {
    fn new(rig: &dyn Rig) -> Self {
        let (source, destination) = (rig.device_memory(BYTES), rig.device_memory(BYTES));
        rig.write(&source, &[OLD; BYTES]);
        rig.write(&destination, &[OLD; BYTES]);
        Self { compute: rig.stream(), out: rig.stream(), back: rig.stream(), source, destination }
    }

    fn finish(&self) {
        for stream in [&self.compute, &self.out, &self.back] {
            stream.synchronize().expect("synchronise");
        }
    }
}

fn wait_for(stream: &StreamRef, before: &StreamRef) {
    stream.wait(&before.record().expect("event")).expect("wait");
}

/// A copy that nobody guards.
fn copy_raw(stream: &StreamRef, direction: Direction, range: &DeviceRange, extent: &HostExtent) {
    let (src_addr, dst_addr) = match direction {
        Direction::Offload => (range.addr(), extent.addr()),
        Direction::Onboard => (extent.addr(), range.addr()),
    };
    // SAFETY: both stay allocated until `Setup::finish`. That they are written and read at the same
    // time is what is shown; only the seeded device, which has one thread, and a GPU, whose copies
    // are not Rust's, are given such copies.
    unsafe { stream.copy(&[RawCopy { direction, src_addr, dst_addr, bytes: BYTES }]) }.expect("copy");
}

fn offload_waits_for_compute(rig: &dyn Rig, edge: bool) -> bool {
    let setup = Setup::new(rig);
    rig.linger(&setup.compute);
    rig.fill(&setup.compute, &setup.source, NEW);
    if edge {
        wait_for(&setup.out, &setup.compute);
    }
    let pairs = vec![(setup.source.clone(), rig.extent(BYTES))];
    let (_gone, extents) = offload(&setup.out, pairs).expect("offload");
    setup.finish();
    extents[0].as_slice().expect("bytes") == [NEW; BYTES]
}

fn readers_of_an_extent_wait_for_its_offload(rig: &dyn Rig, edge: bool) -> bool {
    let setup = Setup::new(rig);
    rig.linger(&setup.out);
    let pairs = vec![(setup.source.clone(), rig.extent(BYTES))];
    let (_gone, extents) = offload(&setup.out, pairs).expect("offload");
    rig.write(&setup.destination, &[NEW; BYTES]);
    if edge {
        let pairs = vec![(setup.destination.clone(), Arc::clone(&extents[0]))];
        drop(onboard(&setup.back, pairs).expect("onboard"));
    } else {
        copy_raw(&setup.back, Direction::Onboard, &setup.destination, &extents[0]);
    }
    setup.finish();
    rig.read(&setup.destination) == [OLD; BYTES]
}

fn onboard_waits_until_its_destination_is_free(rig: &dyn Rig, edge: bool) -> bool {
    let setup = Setup::new(rig);
    let mut extent = rig.extent(BYTES);
    extent.as_mut_slice().expect("bytes").fill(NEW);
    // Compute still reads what was in the memory before.
    let kept = rig.device_memory(BYTES);
    rig.linger(&setup.compute);
    rig.copy(&setup.compute, &kept, &setup.destination);
    if edge {
        wait_for(&setup.back, &setup.compute);
    }
    drop(onboard(&setup.back, vec![(setup.destination.clone(), Arc::new(extent))]).expect("onboard"));
    setup.finish();
    rig.read(&kept) == [OLD; BYTES] && rig.read(&setup.destination) == [NEW; BYTES]
}

fn compute_waits_for_onboard(rig: &dyn Rig, edge: bool) -> bool {
    let setup = Setup::new(rig);
    let mut extent = rig.extent(BYTES);
    extent.as_mut_slice().expect("bytes").fill(NEW);
    let used = rig.device_memory(BYTES);
    rig.linger(&setup.back);
    let pairs = vec![(setup.destination.clone(), Arc::new(extent))];
    let mut returned = onboard(&setup.back, pairs).expect("onboard");
    if edge {
        release_on(&setup.compute, &mut returned);
    }
    rig.copy(&setup.compute, &used, &setup.destination);
    setup.finish();
    rig.read(&used) == [NEW; BYTES]
}

fn an_extent_is_reused_behind_its_readers(rig: &dyn Rig, edge: bool) -> bool {
    let setup = Setup::new(rig);
    let slab = rig.slab(BYTES);
    let mut extent = slab.claim(0..BYTES).expect("free");
    extent.as_mut_slice().expect("bytes").fill(NEW);
    rig.linger(&setup.back);
    if edge {
        let pairs = vec![(setup.destination.clone(), Arc::new(extent))];
        let returned = onboard(&setup.back, pairs).expect("onboard");
        drop(returned); // the lease: it comes back when the copy has passed
        let pairs = vec![(setup.source.clone(), slab.claim(0..BYTES).expect("came back"))];
        drop(offload(&setup.out, pairs).expect("offload"));
    } else {
        copy_raw(&setup.back, Direction::Onboard, &setup.destination, &extent);
        copy_raw(&setup.out, Direction::Offload, &setup.source, &extent);
    }
    setup.finish();
    rig.read(&setup.destination) == [NEW; BYTES]
}

fn a_source_is_reused_behind_its_offload(rig: &dyn Rig, edge: bool) -> bool {
    let setup = Setup::new(rig);
    let extent = rig.extent(BYTES);
    rig.linger(&setup.out);
    let arrived = if edge {
        let (mut gone, mut extents) =
            offload(&setup.out, vec![(setup.source.clone(), extent)]).expect("offload");
        release_on(&setup.compute, &mut gone);
        rig.fill(&setup.compute, &setup.source, NEW);
        setup.finish();
        drop(gone);
        Arc::into_inner(extents.remove(0)).expect("given up")
    } else {
        copy_raw(&setup.out, Direction::Offload, &setup.source, &extent);
        rig.fill(&setup.compute, &setup.source, NEW);
        setup.finish();
        extent
    };
    arrived.as_slice().expect("bytes") == [OLD; BYTES]
}
