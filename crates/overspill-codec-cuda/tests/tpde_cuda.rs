//! The codecs on a GPU: goldens and random segments against the reference. `bench` among the arguments measures the
//! decoders instead, `pack` packs random segments, `encode` measures that, `link` checks and measures the link codec.
//!
//! A machine without a GPU leaves all of it out and says so; with `OVERSPILL_REQUIRE_GPU=1` that is a failure.
//! `OVERSPILL_SEGMENTS` is the number of random segments (2,000).

mod common;
#[path = "common/host_link.rs"]
mod host_link;
#[path = "common/speed.rs"]
mod speed;

use std::ops::Range;
use std::process::ExitCode;
use std::sync::Arc;

use common::{Case, goldens, packed_as_reference, random};
use overspill_codec::{BaseKind, FlatSegment, FlatTables};
use overspill_codec_cuda::{Decoder, DeviceTables, Job, LinkCodec, PackJob, PackMode, PackedSegment, Packer};
use overspill_device::cuda::{CudaConfig, CudaDevice};
use overspill_device::nvrtc::Nvrtc;
use overspill_device::{Device, DeviceRange, StreamRef};

struct Rig {
    device: Arc<CudaDevice>,
    stream: StreamRef,
    decoder: Decoder,
    packer: Packer,
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

/// Parts in one range of device memory, each `lead` bytes behind a multiple of 256, and where they start in it.
fn place_all<'a>(rig: &Rig, parts: impl Iterator<Item = &'a [u8]>, lead: usize) -> (DeviceRange, Vec<usize>) {
    let (mut all, mut starts) = (Vec::new(), Vec::new());
    for part in parts {
        all.resize(all.len().next_multiple_of(256) + lead, 0xee);
        starts.push(all.len());
        all.extend_from_slice(part);
        // Something lies behind every part.
        all.extend_from_slice(&[0xee; 16]);
    }
    (rig.upload(&all), starts)
}

/// Decodes cases together, out of place and in place. Returns how many were decoded by kernels alone.
fn decode_all(rig: &Rig, cases: &[Case]) -> usize {
    let mut tables = FlatTables::new();
    let flats: Vec<FlatSegment> = cases.iter().map(|case| case.flat(&mut tables)).collect();
    let tables = rig.tables(&tables);
    let mut decoded = vec![true; cases.len()];
    for in_place in [false, true] {
        let poison: Vec<Vec<u8>> = cases.iter().map(|case| vec![0xcd; case.last.len()]).collect();
        let is_in_place = |case: &Case| in_place && case.spec.base == BaseKind::Words;
        let old_or_poison = cases.iter().zip(&poison);
        let old_or_poison =
            old_or_poison.map(|(case, poison)| if is_in_place(case) { &case.base[..] } else { &poison[..] });
        let (out, outs) = place_all(rig, old_or_poison, 0);
        let (base, bases) = place_all(rig, cases.iter().map(|case| &case.base[..]), 0);
        let (blob, blobs) = place_all(rig, cases.iter().map(|case| &case.blob[..]), 3);
        let (index, indexes) = place_all(rig, cases.iter().map(|case| &case.index[..]), 0);
        let jobs: Vec<Job<'_>> = cases
            .iter()
            .zip(&flats)
            .enumerate()
            .map(|(i, (case, segment))| {
                let out = out.addr() + outs[i] as u64;
                let base = if is_in_place(case) { out } else { base.addr() + bases[i] as u64 };
                let (blob, index) = (blob.addr() + blobs[i] as u64, index.addr() + indexes[i] as u64);
                Job { segment, base, out, blob, index }
            })
            .collect();
        // SAFETY: the ranges live until the end of the loop's body and are used by nothing else.
        let applied = unsafe { rig.decoder.apply(&rig.stream, &jobs, &tables, true) }.expect("decodes");
        let left: Vec<usize> = applied.left.iter().map(|left| left.job).chain(applied.host).collect();
        let made = rig.device.read(&out).expect("read");
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
            let made = &made[outs[i]..];
            let differ = case.last.iter().zip(made).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{}, in place: {in_place}", case.label);
            let beyond = &made[case.last.len()..][..16];
            assert!(beyond.iter().all(|&b| b == 0xee), "{} wrote beyond its end", case.label);
        }
    }
    decoded.iter().filter(|&&was| was).count()
}

/// Packs cases together. Returns how many the kernels packed, and of how many the reference's bytes came out.
fn pack_all(rig: &Rig, cases: &[Case], mode: PackMode) -> (usize, usize) {
    let (base, bases) = place_all(rig, cases.iter().map(|case| &case.base[..]), 0);
    let (last, lasts) = place_all(rig, cases.iter().map(|case| &case.last[..]), 0);
    let jobs: Vec<PackJob> = cases
        .iter()
        .zip(bases.iter().zip(&lasts))
        .map(|(case, (&own_base, &own_last))| PackJob {
            spec: case.spec,
            base: base.addr() + own_base as u64,
            last: last.addr() + own_last as u64,
        })
        .collect();
    // SAFETY: the ranges live until the end of this function and nothing writes to them.
    let packed = unsafe { rig.packer.pack(&rig.stream, &jobs, mode) }.expect("packs");
    let blob = rig.device.read(&packed.blob).expect("read");
    let made: Vec<(&Case, PackedSegment)> =
        cases.iter().zip(packed.segments).filter_map(|(case, made)| Some((case, made?))).collect();
    let same = made.iter().filter(|(case, segment)| {
        let start = segment.blob_start as usize;
        let index = segment.records.iter().flat_map(|record| record.to_bytes()).collect();
        let bytes = blob[start..start + segment.blob_bytes() as usize].to_vec();
        let is_same = packed_as_reference(case, &[segment.head.clone(), index, bytes]);
        assert!(is_same || case.spec.base != BaseKind::None, "{}: other bytes", case.label);
        is_same
    });
    (made.len(), same.count())
}

/// How many random segments, and how large at most.
fn segments_wanted() -> (u64, usize) {
    let count: u64 = std::env::var("OVERSPILL_SEGMENTS").map_or(2000, |text| text.parse().expect("a number"));
    let words_most = match count {
        0..200 => 40_000,
        200..20_000 => 150_000,
        _ => 6_000,
    };
    (count, words_most)
}

/// Packs random segments with the kernels and compares them with the reference's.
fn packs(rig: &Rig) {
    let (count, words_most) = segments_wanted();
    for mode in [PackMode::Sparse, PackMode::Flags] {
        let (mut packed, mut same) = (0, 0);
        for from in (0..count).step_by(400) {
            let cases = random_cases(from..count.min(from + 400), words_most);
            let (made, equal) = pack_all(rig, &cases, mode);
            (packed, same) = (packed + made, same + equal);
        }
        println!(
            "packed by kernels, {mode:?}: {packed} of {count}, all decode to the same words, {same} are the reference's bytes"
        );
    }
}

/// Random segments, made on all cores.
fn random_cases(seeds: Range<u64>, words_most: usize) -> Vec<Case> {
    let seeds: Vec<u64> = seeds.collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let part = |seeds: &[u64]| seeds.iter().map(|&seed| random(seed, words_most)).collect::<Vec<_>>();
        let threads: Vec<_> =
            seeds.chunks(seeds.len().div_ceil(cores)).map(|seeds| scope.spawn(move || part(seeds))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("encodes")).collect()
    })
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
    let packer = Packer::new(&device, &nvrtc).expect("kernels");
    let link = LinkCodec::new(&device, &nvrtc).expect("kernels");
    let rig = Rig { device, stream, decoder, packer };
    if args.iter().any(|arg| arg == "pack") {
        packs(&rig);
        return ExitCode::SUCCESS;
    }
    if args.iter().any(|arg| arg == "encode") {
        speed::encode(&rig);
        return ExitCode::SUCCESS;
    }
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
    let (count, words_most) = segments_wanted();
    let mut decoded = 0;
    for from in (0..count).step_by(400) {
        let cases = random_cases(from..count.min(from + 400), words_most);
        decoded += decode_all(&rig, &cases);
    }
    println!("random segments: {decoded} of {count} decoded by kernels, bit for bit");
    damaged_payloads_are_refused(&rig);
    ExitCode::SUCCESS
}
