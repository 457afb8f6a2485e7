//! From packed bytes in pinned host memory to ready words on the device, against a copy of the words themselves:
//! payloads and records cross in groups of segments while the group before is decoded.

use std::time::Instant;

use overspill_codec_cuda::{DeviceTables, Job};
use overspill_device::{Device, DeviceRange, Direction, EventRef, HostExtent, RawCopy, StreamRef};

use super::Rig;
use super::common::Case;

/// Segments that cross together.
const GROUP: usize = 8;
/// Groups on their way at once.
const AHEAD: usize = 3;

/// What crosses of one content, in pinned memory.
struct Pinned {
    words: HostExtent,
    blob: HostExtent,
    index: HostExtent,
}

/// Rates of one workload.
pub struct Link {
    /// Raw bytes over bytes that cross.
    pub ratio: f64,
    /// Milliseconds for the words as they are.
    pub raw_ms: f64,
    /// Milliseconds packed, until the last word is in place.
    pub packed_ms: f64,
}

fn pin(rig: &Rig, cases: &[Case]) -> Vec<Pinned> {
    let room = |bytes: &[u8]| bytes.len().next_multiple_of(4096);
    let total = cases.iter().map(|case| room(&case.last) + room(&case.blob) + room(&case.index)).sum();
    let slab = rig.device.alloc_host(total).expect("pinned memory");
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        let mut extent = slab.claim(at..at + bytes.len()).expect("inside");
        extent.as_mut_slice().expect("idle").copy_from_slice(bytes);
        at += room(bytes);
        extent
    };
    cases
        .iter()
        .map(|case| Pinned { words: put(&case.last), blob: put(&case.blob), index: put(&case.index) })
        .collect()
}

fn onboard(from: &HostExtent, to: u64) -> RawCopy {
    RawCopy { direction: Direction::Onboard, src_addr: from.addr(), dst_addr: to, bytes: from.bytes() }
}

/// Measures both ways; `jobs` decode into `out`, job i the content i modulo the cases.
pub fn measure(
    rig: &Rig,
    cases: &[Case],
    jobs: &[Job<'_>],
    tables: &DeviceTables,
    out: &DeviceRange,
) -> Link {
    let pinned = pin(rig, cases);
    let of = |i: usize| &pinned[i % pinned.len()];
    let copier = rig.device.new_stream("link").expect("stream");
    let raw: Vec<RawCopy> = jobs.iter().enumerate().map(|(i, job)| onboard(&of(i).words, job.out)).collect();
    let packed: Vec<RawCopy> = jobs
        .iter()
        .enumerate()
        .flat_map(|(i, job)| [onboard(&of(i).blob, job.blob), onboard(&of(i).index, job.index)])
        .collect();
    let mut best = Link { ratio: 0.0, raw_ms: f64::MAX, packed_ms: f64::MAX };
    let bytes = |copies: &[RawCopy]| copies.iter().map(|copy| copy.bytes).sum::<usize>() as f64;
    best.ratio = bytes(&raw) / bytes(&packed);
    for _ in 0..3 {
        let begin = Instant::now();
        send(&copier, &raw).synchronize().expect("copied");
        best.raw_ms = best.raw_ms.min(begin.elapsed().as_secs_f64() * 1e3);
        let begin = Instant::now();
        decode_behind(rig, &copier, jobs, &packed, tables);
        best.packed_ms = best.packed_ms.min(begin.elapsed().as_secs_f64() * 1e3);
        for i in [0, jobs.len() / 2 + 1, jobs.len() - 1] {
            let at = (jobs[i].out - out.addr()) as usize;
            let expected = &cases[i % cases.len()].last;
            let made = rig.device.read(&out.slice(at..at + expected.len()).expect("inside")).expect("read");
            assert!(made == *expected, "segment {i} differs");
        }
    }
    best
}

fn send(copier: &StreamRef, copies: &[RawCopy]) -> EventRef {
    // SAFETY: extents and ranges live until the caller has waited for the event; nobody else uses them.
    unsafe { copier.copy(copies) }.expect("enqueued");
    copier.record().expect("event")
}

fn decode_behind(rig: &Rig, copier: &StreamRef, jobs: &[Job<'_>], packed: &[RawCopy], tables: &DeviceTables) {
    let groups: Vec<&[RawCopy]> = packed.chunks(2 * GROUP).collect();
    let mut sent: Vec<EventRef> = groups.iter().take(AHEAD).map(|group| send(copier, group)).collect();
    for (i, group) in jobs.chunks(GROUP).enumerate() {
        rig.stream.wait(&sent[i]).expect("ordered");
        // SAFETY: all ranges live; outputs do not overlap, and the stream waits for what is decoded.
        let applied = unsafe { rig.decoder.apply(&rig.stream, group, tables, true) }.expect("decodes");
        assert!(applied.left.is_empty() && applied.host.is_empty(), "left to the host");
        if let Some(next) = groups.get(i + AHEAD) {
            sent.push(send(copier, next));
        }
    }
}
