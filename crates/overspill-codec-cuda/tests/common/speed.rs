//! Rates of the decoders on a 7B shape: 400 segments of 2^24 bf16 words, distinct memory, four distinct contents.

use std::time::Instant;

use overspill_codec::*;
use overspill_codec_cuda::{Job, LinkCodec, LinkPlaces, PackJob, PackMode, Packed};
use overspill_device::cuda::CudaDevice;
use overspill_device::{Device, DeviceRange, EventRef};

use super::Rig;
use super::common::{Case, bf16, normal, packed_as_reference, training_step};
use super::host_link::{self, Link};

const WORDS: usize = 1 << 24;
const CONTENTS: u64 = 4;

fn share_changed(old: &[u8], new: &[u8]) -> f64 {
    let pairs = old.chunks_exact(2).zip(new.chunks_exact(2));
    pairs.filter(|(a, b)| a != b).count() as f64 / (old.len() / 2) as f64
}

/// The step that changes a share of the words.
fn lr_for(share: f64) -> f32 {
    let (mut low, mut high) = (1e-8f32, 1.0f32);
    for _ in 0..20 {
        let middle = (low * high).sqrt();
        let (old, new) = training_step(99, middle, 1 << 18);
        if share_changed(&old, &new) < share { low = middle } else { high = middle }
    }
    low
}

fn cases(lr: f32, standalone: bool, codec: CodecChoice) -> Vec<Case> {
    let make = |seed| {
        let (old, new) = training_step(seed, lr, WORDS);
        let base = if standalone { Base::None } else { Base::Words(&old) };
        let options = EncodeOptions { row_words: 4096, codec, ..EncodeOptions::default() };
        let mut case = Case::encode(String::new(), base, new, Dtype::Bf16, &options);
        case.base = old;
        case
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=CONTENTS).map(|seed| scope.spawn(move || make(seed))).collect();
        threads.into_iter().map(|thread| thread.join().expect("encoded")).collect()
    })
}

/// One measured row for bench/tpde_gpu.py.
fn row(id: &str, value: f64, unit: &str, note: &str) {
    println!("ROW\t{id}\t{value}\t{unit}\t{note}");
}

struct Timed {
    wall_ms: f64,
    gpu_ms: f64,
}

fn median(mut all: Vec<Timed>) -> Timed {
    all.sort_by(|a, b| a.wall_ms.total_cmp(&b.wall_ms));
    all.swap_remove(all.len() / 2)
}

fn timed(rig: &Rig, mut run: impl FnMut()) -> Timed {
    let start: EventRef = rig.stream.record().expect("event");
    let begin = Instant::now();
    run();
    let wall_ms = begin.elapsed().as_secs_f64() * 1e3;
    let end = rig.stream.record().expect("event");
    end.synchronize().expect("done");
    Timed { wall_ms, gpu_ms: (end.time_us().expect("time") - start.time_us().expect("time")) / 1e3 }
}

fn place(device: &CudaDevice, bytes: &[u8], copies: usize, each: usize) -> DeviceRange {
    let range = device.alloc_device(each * copies).expect("memory");
    for copy in 0..copies {
        device
            .write(&range.slice(copy * each..copy * each + bytes.len()).expect("inside"), bytes)
            .expect("write");
    }
    range
}

/// All of it; with `sparse_only` only the patch in place, for a comparison of decoders.
pub fn measure(rig: &Rig, sparse_only: bool) {
    let copies: usize = std::env::var("OVERSPILL_COPIES").map_or(100, |text| text.parse().expect("a number"));
    let segments = copies * CONTENTS as usize;
    let raw_bytes = segments * WORDS * 2;
    let finals = rig.device.alloc_device(raw_bytes).expect("memory");
    let bases = rig.device.alloc_device(raw_bytes).expect("memory");
    println!("{segments} segments of 2^24 bf16 words, {:.2} GB raw; random weights", raw_bytes as f64 / 1e9);
    let wanted = std::env::var("OVERSPILL_WORKLOADS").ok();
    let is_wanted = |name: &str| wanted.as_ref().is_none_or(|list| list.split(',').any(|one| one == name));
    let mut bases_written = false;
    let mut links = Vec::new();
    let (sparse_lr, dense_lr) = (lr_for(0.024), lr_for(0.6));
    for (name, lr, codec) in [
        ("sparse", sparse_lr, CodecChoice::Gpu),
        ("dense", dense_lr, CodecChoice::Gpu),
        ("standalone", 1e-6, CodecChoice::Auto),
        ("smallest_sparse", sparse_lr, CodecChoice::Auto),
        ("smallest_dense", dense_lr, CodecChoice::Auto),
    ] {
        if !is_wanted(name) || (sparse_only && name != "smallest_sparse") {
            continue;
        }
        let standalone = name == "standalone";
        let cases = cases(lr, standalone, codec);
        let mut tables = FlatTables::new();
        let flats: Vec<FlatSegment> =
            (0..segments).map(|i| cases[i % cases.len()].flat(&mut tables)).collect();
        let tables = rig.tables(&tables);
        let pitch =
            cases.iter().map(|case| case.blob.len()).max().expect("cases").next_multiple_of(256) + 1024;
        let blobs: Vec<DeviceRange> =
            cases.iter().map(|case| place(&rig.device, &case.blob, copies, pitch)).collect();
        let indexes: Vec<DeviceRange> = cases
            .iter()
            .map(|case| place(&rig.device, &case.index, copies, case.index.len().next_multiple_of(256)))
            .collect();
        // The weights of a seed are the same in every workload.
        for i in (0..segments).filter(|_| !bases_written) {
            let range = i * WORDS * 2..(i + 1) * WORDS * 2;
            rig.device
                .write(&bases.slice(range).expect("inside"), &cases[i % cases.len()].base)
                .expect("write");
        }
        bases_written = true;
        let changed: f64 = cases.iter().map(|case| share_changed(&case.base, &case.last)).sum();
        let packed: usize = (0..segments).map(|i| cases[i % cases.len()].blob.len()).sum();
        println!(
            "{name}: {:.2}% changed, ratio {:.1}, chunks of 2^{}, {} chunks",
            100.0 * changed / CONTENTS as f64,
            raw_bytes as f64 / packed as f64,
            flats[0].chunk_log2,
            flats.iter().map(|flat| flat.chunks).sum::<u32>()
        );
        for in_place in [false, true] {
            if in_place && standalone {
                continue;
            }
            let jobs: Vec<Job<'_>> = (0..segments)
                .map(|i| {
                    let (content, copy) = (i % cases.len(), i / cases.len());
                    let at = (i * WORDS * 2) as u64;
                    let index = indexes[content].addr()
                        + (copy * cases[content].index.len().next_multiple_of(256)) as u64;
                    Job {
                        segment: &flats[i],
                        base: if in_place { finals.addr() } else { bases.addr() } + at,
                        out: finals.addr() + at,
                        blob: blobs[content].addr() + (copy * pitch) as u64,
                        index,
                    }
                })
                .collect();
            for check in [false, true] {
                let mut all = Vec::new();
                let mut scratch_bytes = 0;
                for _ in 0..5 {
                    if in_place {
                        copy(rig, &finals, &bases);
                    }
                    all.push(timed(rig, || {
                        // SAFETY: all ranges live; outputs do not overlap.
                        let applied = unsafe { rig.decoder.apply(&rig.stream, &jobs, &tables, check) }
                            .expect("decodes");
                        assert!(applied.left.is_empty() && applied.host.is_empty(), "left to the host");
                        scratch_bytes = applied.scratch_bytes;
                    }));
                }
                all.remove(0);
                let Timed { wall_ms, gpu_ms } = median(all);
                println!(
                    "  in place {in_place}, checked {check}: wall {wall_ms:.2} ms, GPU {gpu_ms:.2} ms, {:.3} TB/s of output, scratch {scratch_bytes} B",
                    raw_bytes as f64 / gpu_ms / 1e9
                );
                let rate = raw_bytes as f64 / gpu_ms / 1e9;
                let what = format!(
                    "{:.2} GB of bf16 in {segments} segments, random weights N(0, 0.02), mode {}, {:.2}% changed, \
                     ratio {:.1}, patch in VRAM, median of 4",
                    raw_bytes as f64 / 1e9,
                    cases[0].mode(),
                    100.0 * changed / CONTENTS as f64,
                    raw_bytes as f64 / packed as f64
                );
                match (name, in_place, check) {
                    _ if sparse_only => {}
                    ("smallest_sparse", true, true) => {
                        row(
                            "tpde.gpu.smallest_apply_7b_ms",
                            wall_ms,
                            "ms",
                            &format!("{what}; as apply_7b_ms"),
                        );
                    }
                    ("sparse", true, true) => {
                        row(
                            "tpde.gpu.apply_7b_ms",
                            wall_ms,
                            "ms",
                            &format!(
                                "{what}; in place, every payload's check first, wall clock with planning and launches"
                            ),
                        );
                        row(
                            "tpde.gpu.scratch_bytes",
                            scratch_bytes as f64,
                            "B",
                            &format!(
                                "{what}; the patch's own {} B of unpacked tables not counted",
                                tables.device_bytes()
                            ),
                        );
                    }
                    (_, false, false) => row(
                        &format!("tpde.gpu.{name}_out_tbps"),
                        rate,
                        "TB/s",
                        &format!("{what}; out of place, bytes written, events around all kernels"),
                    ),
                    _ => {}
                }
                for i in [0, segments / 2 + 1, segments - 1] {
                    let range = i * WORDS * 2..(i + 1) * WORDS * 2;
                    let made = rig.device.read(&finals.slice(range).expect("inside")).expect("read");
                    assert!(made == cases[i % cases.len()].last, "segment {i} differs");
                }
            }
            if !sparse_only && !in_place && !name.starts_with("smallest") {
                links.push(host_link::measure(rig, &cases, &jobs, &tables, &finals));
            }
        }
    }
    if sparse_only {
        return;
    }
    link_row(&links);
    let all = (0..5).map(|_| timed(rig, || copy(rig, &finals, &bases))).collect();
    let Timed { gpu_ms, .. } = median(all);
    let rate = 2.0 * raw_bytes as f64 / gpu_ms / 1e9;
    row(
        "tpde.gpu.copy_tbps",
        rate,
        "TB/s",
        "device to device, read + written, same run: the roofline of the rows above",
    );
    println!(
        "copy of {:.2} GB: {gpu_ms:.2} ms, {:.3} TB/s read + written",
        raw_bytes as f64 / 1e9,
        2.0 * raw_bytes as f64 / gpu_ms / 1e9
    );
}

/// Packs steps, then words without a base; segment i is the content i modulo the cases.
pub fn encode(rig: &Rig) {
    encode_one(rig, "tpde.gpu.encode_7b_ms", false);
    encode_one(rig, "tpde.gpu.encode_standalone_ms", true);
}

fn encode_one(rig: &Rig, id: &str, standalone: bool) {
    let copies: usize = std::env::var("OVERSPILL_COPIES").map_or(100, |text| text.parse().expect("a number"));
    let segments = copies * CONTENTS as usize;
    let raw_bytes = segments * WORDS * 2;
    let bases = rig.device.alloc_device(raw_bytes).expect("memory");
    let finals = rig.device.alloc_device(raw_bytes).expect("memory");
    let cases = cases(lr_for(0.024), standalone, CodecChoice::Gpu);
    let mut jobs = Vec::new();
    for i in 0..segments {
        let (at, case) = (i * WORDS * 2, &cases[i % cases.len()]);
        let range = at..at + WORDS * 2;
        rig.device.write(&bases.slice(range.clone()).expect("inside"), &case.base).expect("write");
        rig.device.write(&finals.slice(range).expect("inside"), &case.last).expect("write");
        let at = at as u64;
        jobs.push(PackJob { spec: case.spec, base: bases.addr() + at, last: finals.addr() + at });
    }
    let changed: f64 = cases.iter().map(|case| share_changed(&case.base, &case.last)).sum();
    let changed_pct = 100.0 * changed / CONTENTS as f64;
    let mut made: Option<Packed> = None;
    let mut all = Vec::new();
    for _ in 0..5 {
        drop(made.take());
        all.push(timed(rig, || {
            // SAFETY: the ranges live, and nothing writes to them.
            made = Some(unsafe { rig.packer.pack(&rig.stream, &jobs, PackMode::Flags) }.expect("packs"));
        }));
    }
    all.remove(0);
    let Timed { wall_ms, gpu_ms } = median(all);
    let made = made.expect("packed");
    let left = made.segments.iter().filter(|segment| segment.is_none()).count();
    assert_eq!(left, 0, "segments were left to the host");
    let mut same = 0;
    for i in [0, 1, 2, jobs.len() - 1] {
        let (case, segment) =
            (&cases[i % cases.len()], made.segments[i].as_ref().expect("packed by kernels"));
        let range = segment.blob_start as usize..(segment.blob_start + segment.blob_bytes()) as usize;
        let blob = rig.device.read(&made.blob.slice(range).expect("inside")).expect("read");
        let index = segment.records.iter().flat_map(|record| record.to_bytes()).collect();
        same += u32::from(packed_as_reference(case, &[segment.head.clone(), index, blob]));
    }
    println!(
        "{id}: wall {wall_ms:.2} ms, GPU {gpu_ms:.2} ms, ratio {:.2}, {same} of 4 segments looked at are the reference's bytes",
        raw_bytes as f64 / made.blob_bytes as f64
    );
    let what = if standalone {
        "mode W, final words in VRAM".to_owned()
    } else {
        format!("mode F, {changed_pct:.2}% changed, base and final in VRAM")
    };
    row(
        id,
        wall_ms,
        "ms",
        &format!(
            "{:.2} GB of bf16 in {} segments, random weights N(0, 0.02), {what}, ratio {:.2}, payloads in VRAM, wall clock \
             with heads made on the host, median of 4",
            raw_bytes as f64 / 1e9,
            jobs.len(),
            raw_bytes as f64 / made.blob_bytes as f64
        ),
    );
}

/// The share of its ratio by which packed words are there sooner: the worst of the ratios up to 10.
fn link_row(links: &[Link]) {
    let share = |link: &Link| link.raw_ms / link.packed_ms / link.ratio;
    let told: Vec<String> = links
        .iter()
        .map(|link| {
            let Link { ratio, raw_ms, packed_ms } = link;
            format!(
                "ratio {ratio:.2}: {raw_ms:.1} ms raw, {packed_ms:.2} ms packed, share {:.3}",
                share(link)
            )
        })
        .collect();
    println!("pinned host memory to ready words: {}", told.join("; "));
    let worst = links.iter().filter(|link| link.ratio <= 10.0).map(share).fold(f64::MAX, f64::min);
    let note = format!(
        "random weights, pinned host memory to ready words on the device, payloads checked, best of 3; {}",
        told.join("; ")
    );
    row("tpde_gpu.patch_link_share_of_ratio", worst, "share", &note);
}

/// A copy on the device, by a segment without chunks.
fn copy(rig: &Rig, to: &DeviceRange, from: &DeviceRange) {
    let mut tables = FlatTables::new();
    let spec = SegmentSpec {
        dtype: Dtype::U32,
        words: WORDS,
        row_words: 0,
        first_word: 0,
        base: BaseKind::Words,
        kind: PatchKind::Relative,
    };
    let flat = tables.take(spec, &mut &[0u8][..], &mut &[][..]).expect("an unchanged segment");
    let tables = rig.tables(&tables);
    let jobs: Vec<Job<'_>> = (0..to.bytes() / (4 * WORDS))
        .map(|i| {
            let at = (4 * i * WORDS) as u64;
            Job { segment: &flat, base: from.addr() + at, out: to.addr() + at, blob: 0, index: 0 }
        })
        .collect();
    // SAFETY: both ranges live and do not overlap.
    unsafe { rig.decoder.apply(&rig.stream, &jobs, &tables, false) }.expect("copied");
}

/// The link codec: words that come back, and its rates on `words` bf16 words of N(0, 1), whose exponents have about
/// the entropy of activations.
pub fn link(rig: &Rig, codec: &LinkCodec) {
    let mut rng = fastrand::Rng::with_seed(8);
    for format in [LinkFormat::Bf16, LinkFormat::F16] {
        for count in [1usize, 5, 8191, 8192, 100_000, 3_000_001] {
            let bytes: Vec<u8> = (0..count).flat_map(|_| bf16(normal(&mut rng))).collect();
            let packed = pack(rig, codec, format, &bytes);
            let mut back = vec![0; bytes.len()];
            link_decode(format, &packed, &mut back).expect("the reference unpacks it");
            assert!(back == bytes, "{format:?}, {count} words: the reference finds other words");
        }
    }
    println!("link codec: packed on the GPU, unpacked on it and by the reference, bit for bit");
    let count: usize = 1 << 30;
    let bytes: Vec<u8> = (0..count >> 5).flat_map(|_| bf16(normal(&mut rng))).collect();
    let words = place(&rig.device, &bytes, 32, bytes.len());
    let back = rig.device.alloc_device(words.bytes()).expect("memory");
    let payload = rig.device.alloc_device(LinkFormat::Bf16.payload_bound_bytes(count)).expect("memory");
    let records = rig.device.alloc_device(count / LINK_CHUNK_WORDS * 8).expect("memory");
    let counter = rig.device.alloc_device(256).expect("memory");
    let places = LinkPlaces { payload: payload.addr(), records: records.addr(), counter: counter.addr() };
    let mut units = 0;
    let mut rates = Vec::new();
    for decodes in [false, true] {
        let mut all: Vec<Timed> = (0..6)
            .map(|_| {
                rig.device.write(&counter, &[0; 256]).expect("write");
                let time = timed(rig, || {
                    // SAFETY: all ranges live until the end of this function, and `timed` waits.
                    unsafe {
                        match decodes {
                            false => codec.encode(
                                &rig.stream,
                                LinkFormat::Bf16,
                                words.addr(),
                                count as u64,
                                &places,
                            ),
                            true => codec.decode(
                                &rig.stream,
                                LinkFormat::Bf16,
                                back.addr(),
                                count as u64,
                                &places,
                                units * 16,
                            ),
                        }
                    }
                    .expect("launched");
                });
                let read = rig.device.read(&counter).expect("read");
                let value = u64::from(u32::from_le_bytes([read[0], read[1], read[2], read[3]]));
                if decodes {
                    assert_eq!(value, 0, "a bad record")
                } else {
                    units = value
                }
                time
            })
            .collect();
        all.remove(0);
        rates.push((2 * count) as f64 / median(all).gpu_ms / 1e9);
    }
    for at in [0, words.bytes() / 2, words.bytes() - (1 << 20)] {
        let [left, right] = [&words, &back]
            .map(|range| rig.device.read(&range.slice(at..at + (1 << 20)).expect("inside")).expect("read"));
        assert!(left == right, "words differ");
    }
    let packed_bytes = units * 16 + records.bytes() as u64;
    println!(
        "link codec, 2^30 bf16 words N(0, 1): encode {:.3} TB/s, decode {:.3} TB/s of raw words, {:.2} bits a word, ratio {:.3}",
        rates[0],
        rates[1],
        packed_bytes as f64 * 8.0 / count as f64,
        (2 * count) as f64 / packed_bytes as f64
    );
    let note = "2^30 bf16 words N(0, 1), random; raw bytes a second, events; the slower of encode and decode";
    row("storm.link_codec_tbps", rates[0].min(rates[1]), "TB/s", note);
    row("storm.link_codec_ratio", (2 * count) as f64 / packed_bytes as f64, ":1", note);
    let both = (0..5).map(|_| timed(rig, || copy(rig, &back, &words))).collect();
    println!(
        "copy in the same run: {:.3} TB/s read + written",
        2.0 * words.bytes() as f64 / median(both).gpu_ms / 1e9
    );
}

/// Packs on the device, checks that the device unpacks it too, and brings it here.
fn pack(rig: &Rig, codec: &LinkCodec, format: LinkFormat, bytes: &[u8]) -> LinkPacked {
    let count = (bytes.len() / 2) as u64;
    let chunks = bytes.len().div_ceil(2 * LINK_CHUNK_WORDS);
    let (words, back) = (rig.upload(bytes), rig.upload(&vec![0xcd; bytes.len()]));
    let payload = rig.device.alloc_device(format.payload_bound_bytes(bytes.len() / 2)).expect("memory");
    let (records, counter) = (rig.upload(&vec![0; chunks * 8]), rig.upload(&[0; 256]));
    let places = LinkPlaces { payload: payload.addr(), records: records.addr(), counter: counter.addr() };
    // SAFETY: all ranges live until the end of this function, which waits.
    unsafe { codec.encode(&rig.stream, format, words.addr(), count, &places) }.expect("launched");
    rig.stream.synchronize().expect("packed");
    let units =
        u32::from_le_bytes(rig.device.read(&counter).expect("read")[..4].try_into().expect("4 bytes"));
    rig.device.write(&counter, &vec![0; counter.bytes()]).expect("write");
    let payload_bytes = u64::from(units) * 16;
    // SAFETY: as above.
    unsafe { codec.decode(&rig.stream, format, back.addr(), count, &places, payload_bytes) }
        .expect("launched");
    rig.stream.synchronize().expect("unpacked");
    assert!(rig.device.read(&back).expect("read")[..bytes.len()] == *bytes, "{format:?}: words differ");
    let read = rig.device.read(&records).expect("read");
    let word = |at: usize| u32::from_le_bytes(read[at..at + 4].try_into().expect("4 bytes"));
    LinkPacked {
        payload: rig.device.read(&payload).expect("read")[..payload_bytes as usize].to_vec(),
        records: (0..chunks).map(|chunk| [word(8 * chunk), word(8 * chunk + 4)]).collect(),
    }
}
