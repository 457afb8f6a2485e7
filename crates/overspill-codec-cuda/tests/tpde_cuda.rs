//! The codecs on a GPU: goldens and random segments against the reference. `bench` among the arguments measures the
//! decoders instead, `link` checks and measures the link codec.
//!
//! A machine without a GPU leaves all of it out and says so; with `OVERSPILL_REQUIRE_GPU=1` that is a failure.
//! `OVERSPILL_SEGMENTS` is the number of random segments (2,000).

mod common;
#[path = "common/host_link.rs"]
mod host_link;
#[path = "common/speed.rs"]
mod speed;

use std::process::ExitCode;
use std::sync::Arc;

use common::{Case, goldens, random};
use overspill_codec::{BaseKind, FlatSegment, FlatTables};
use overspill_codec_cuda::{Decoder, DeviceTables, Job, LinkCodec};
use overspill_device::cuda::{CudaConfig, CudaDevice};
use overspill_device::nvrtc::Nvrtc;
use overspill_device::{Device, DeviceRange, StreamRef};

struct Rig {
    device: Arc<CudaDevice>,
    stream: StreamRef,
    decoder: Decoder,
}

impl Rig {
    fn tables(&self, tables: &FlatTables) -> DeviceTables {
        DeviceTables::load(&self.device, tables).expect("memory")
    }

    fn upload(&self, bytes: &[u8]) -> DeviceRange {
        let range = self.device.alloc_device(bytes.len().next_multiple_of(256) + 256).expect("memory");
        let padded = [bytes, &vec![0xee; range.bytes() - bytes.len()]].concat();
        self.device.write(&range, &padded).expect("write");
        range
    }
}

/// Decodes cases together, out of place and in place. Returns how many were decoded by kernels alone.
fn decode_all(rig: &Rig, cases: &[Case]) -> usize {
    let mut tables = FlatTables::new();
    let flats: Vec<FlatSegment> = cases.iter().map(|case| case.flat(&mut tables)).collect();
    let tables = rig.tables(&tables);
    let mut decoded = vec![true; cases.len()];
    for in_place in [false, true] {
        let memory: Vec<[DeviceRange; 4]> = cases
            .iter()
            .map(|case| {
                let in_place = in_place && case.spec.base == BaseKind::Words;
                let out =
                    if in_place { rig.upload(&case.base) } else { rig.upload(&vec![0xcd; case.last.len()]) };
                let blob = [&[0xee; 3][..], &case.blob].concat();
                [rig.upload(&case.base), out, rig.upload(&blob), rig.upload(&case.index)]
            })
            .collect();
        let jobs: Vec<Job<'_>> = memory
            .iter()
            .zip(&flats)
            .map(|([base, out, blob, index], segment)| {
                let words = segment.spec.base == BaseKind::Words;
                let base = if in_place && words { out.addr() } else { base.addr() };
                Job { segment, base, out: out.addr(), blob: blob.addr() + 3, index: index.addr() }
            })
            .collect();
        // SAFETY: the ranges live until the end of the loop's body and are used by nothing else.
        let applied = unsafe { rig.decoder.apply(&rig.stream, &jobs, &tables, true) }.expect("decodes");
        let left: Vec<usize> = applied.left.iter().map(|left| left.job).chain(applied.host).collect();
        for (i, case) in cases.iter().enumerate() {
            if left.contains(&i) {
                // Denser chunks than a block holds are the host's too.
                assert!(
                    case.is_for_the_host() || case.has_many_symbols(),
                    "{} was left to the host",
                    case.label
                );
                decoded[i] = false;
                continue;
            }
            let made = rig.device.read(&memory[i][1]).expect("read");
            let differ = case.last.iter().zip(&made).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{}, in place: {in_place}", case.label);
            let beyond = &made[case.last.len()..];
            assert!(beyond.iter().all(|&b| b == 0xee), "{} wrote beyond its end", case.label);
        }
    }
    decoded.iter().filter(|&&was| was).count()
}

fn damaged_payloads_are_refused(rig: &Rig) {
    let mut refused = 0;
    for seed in 0..40 {
        let mut case = random(seed, 40_000);
        if case.blob.is_empty() || case.spec.dtype.word_bytes() == 8 {
            continue;
        }
        let at = fastrand::Rng::with_seed(seed).usize(..case.blob.len());
        case.blob[at] ^= 1 << (seed % 8);
        let mut tables = FlatTables::new();
        let flat = case.flat(&mut tables);
        let tables = rig.tables(&tables);
        let [base, out, blob, index] =
            [&case.base, &case.last, &case.blob, &case.index].map(|b| rig.upload(b));
        let job = Job {
            segment: &flat,
            base: base.addr(),
            out: out.addr(),
            blob: blob.addr(),
            index: index.addr(),
        };
        // SAFETY: the ranges live until the end of the loop's body.
        let checked = unsafe { rig.decoder.apply(&rig.stream, &[job], &tables, true) };
        assert!(checked.is_err(), "{}: a changed bit passed the check", case.label);
        assert!(
            case.last == rig.device.read(&out).expect("read")[..case.last.len()],
            "written before the check"
        );
        // Without the check the kernels must come to an end, whatever they make of it.
        // SAFETY: as above.
        let unchecked = unsafe { rig.decoder.apply(&rig.stream, &[job], &tables, false) };
        refused += u32::from(unchecked.is_err());
    }
    println!("damaged payloads: all refused by their checks, {refused} by decoders alone");
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let required = std::env::var_os("OVERSPILL_REQUIRE_GPU").is_some_and(|value| value == "1");
    let opened = CudaDevice::open(CudaConfig::default()).and_then(|device| Ok((device, Nvrtc::find(None)?)));
    let (device, nvrtc) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            println!("TPDE on a GPU: left out: {error}");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let decoder = Decoder::new(&device, &nvrtc).expect("kernels");
    let stream = device.new_stream("decode").expect("stream");
    let link = LinkCodec::new(&device, &nvrtc).expect("kernels");
    let rig = Rig { device, stream, decoder };
    if args.iter().any(|arg| arg == "link") {
        speed::link(&rig, &link);
        return ExitCode::SUCCESS;
    }
    if args.iter().any(|arg| arg == "bench") {
        speed::measure(&rig, false);
        return ExitCode::SUCCESS;
    }
    if let Some(bytes) = args.iter().find_map(|arg| arg.strip_prefix("sparse=")) {
        let decoder = rig.decoder.with_sparse_bytes(bytes.parse().expect("a number"));
        speed::measure(&Rig { decoder, ..rig }, true);
        return ExitCode::SUCCESS;
    }
    let goldens = goldens();
    println!("goldens: {} of {} decoded by kernels, bit for bit", decode_all(&rig, &goldens), goldens.len());
    let count: u64 = std::env::var("OVERSPILL_SEGMENTS").map_or(2000, |text| text.parse().expect("a number"));
    let words_most = if count < 200 { 40_000 } else { 150_000 };
    let mut decoded = 0;
    for from in (0..count).step_by(50) {
        let cases: Vec<Case> = (from..count.min(from + 50)).map(|seed| random(seed, words_most)).collect();
        decoded += decode_all(&rig, &cases);
    }
    println!("random segments: {decoded} of {count} decoded by kernels, bit for bit");
    damaged_payloads_are_refused(&rig);
    ExitCode::SUCCESS
}
