//! The kernels' source, compiled as C++ and run on the host by `emulate.hpp`, against the reference decoder.
//!
//! Needs a C++ compiler; a machine without one leaves the tests out and says so.

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use common::{Case, goldens, packed_as_reference, random, training_step};
use libloading::{Library, Symbol};
use overspill_codec::{
    Base, BaseKind, ChunkMode, CodecChoice, Dtype, EncodeOptions, FlatTables, LINK_CHUNK_WORDS, LinkFormat,
    RECORD_BYTES, link_encode,
};
use overspill_codec_cuda::pack_plan::{
    CELLS, COUNT_THREADS, ChunkPlan, CountPlan, LIST_WORDS, LISTED, OUTCOME_WORDS, PACK_BYTES,
    head_of_planes, plane_cells, probe_bytes,
};
use overspill_codec_cuda::plan::{Family, Job, Places, Plan, THREADS, USUAL_SPARSE_BYTES};
use overspill_codec_cuda::state::{self, Span};
use overspill_codec_cuda::{PackJob, PackMode};
use overspill_device::{cuda::Arg, kernels};
use overspill_tpde::hash_segment;

type Emulate = unsafe extern "C" fn(*mut std::ffi::c_void, u32, u32, *const u64, u32);

/// The kernels as a library of this machine. One launch at a time.
static EMULATOR: OnceLock<Option<Mutex<Library>>> = OnceLock::new();
static ENCODE_EMULATOR: OnceLock<Option<Mutex<Library>>> = OnceLock::new();
static LINK_EMULATOR: OnceLock<Option<Mutex<Library>>> = OnceLock::new();
static REBUILD_EMULATOR: OnceLock<Option<Mutex<Library>>> = OnceLock::new();
static STATE_EMULATOR: OnceLock<Option<Mutex<Library>>> = OnceLock::new();

fn compile(kernels: &kernels::Source) -> Option<Mutex<Library>> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("{}-{}.cpp", kernels.name, std::process::id()));
    let library = folder.join(format!("{}-{}.so", kernels.name, std::process::id()));
    let shim = concat!(env!("CARGO_MANIFEST_DIR"), "/../overspill-device/src/kernels/emulate.hpp");
    std::fs::write(&source, format!("#include \"{shim}\"\n{}", kernels.text)).expect("written");
    let made = Command::new("c++")
        .args([
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Wno-unused-function",
            "-Wno-maybe-uninitialized",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-o",
        ])
        .args([&library, &source])
        .status();
    match made {
        Err(error) => {
            eprintln!("left out: no C++ compiler ({error})");
            return None;
        }
        Ok(status) => assert!(status.success(), "the kernels do not compile as C++"),
    }
    // SAFETY: compiled from our own source; it has no initialisers.
    let loaded = unsafe { Library::new(&library) }.expect("loads");
    let _ = std::fs::remove_file(source).and_then(|()| std::fs::remove_file(library));
    Some(Mutex::new(loaded))
}

fn emulator() -> Option<&'static Mutex<Library>> {
    EMULATOR.get_or_init(|| compile(&kernels::TPDE)).as_ref()
}

fn encode_emulator() -> Option<&'static Mutex<Library>> {
    ENCODE_EMULATOR.get_or_init(|| compile(&kernels::TPDE_ENCODE)).as_ref()
}

fn link_emulator() -> Option<&'static Mutex<Library>> {
    LINK_EMULATOR.get_or_init(|| compile(&kernels::LINK)).as_ref()
}

fn launch(library: &Library, kernel: &str, [blocks, threads]: [u32; 2], args: &[Arg]) {
    let args: Vec<u64> = args
        .iter()
        .map(|arg| match *arg {
            Arg::U64(value) => value,
            Arg::U32(value) => value.into(),
            Arg::F32(value) => value.to_bits().into(),
        })
        .collect();
    // SAFETY: names and types are those of emulate.hpp and of the kernels.
    unsafe {
        let function: Symbol<'_, *mut std::ffi::c_void> = library.get(kernel.as_bytes()).expect("kernel");
        let emulate: Symbol<'_, Emulate> = library.get(b"emulate").expect("emulate");
        emulate(*function, blocks, threads, args.as_ptr(), args.len() as u32);
    }
}

/// Decodes a case: its words, or the kernels' error code. `None` if chunks were left to the host.
fn decode(
    library: &Library,
    case: &Case,
    in_place: bool,
    check: bool,
    capacity_bytes: u32,
) -> Result<Option<Vec<u8>>, u32> {
    let mut tables = FlatTables::new();
    let flat = case.flat(&mut tables);
    // Sixteen bytes aligned, as device memory is, and off by a word where the seed says so.
    let mut words = vec![0u128; case.last.len() / 16 + 2];
    let mut base = vec![0u128; case.base.len() / 16 + 2];
    let mut index = case.index.clone();
    index.extend([0; 4]);
    let index: Vec<u32> = index.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
    let mut blob = vec![0xee, 0xee, 0xee];
    blob.extend_from_slice(&case.blob);
    blob.extend([0xee; 8]);
    let shift = if case.label.len().is_multiple_of(2) { 0 } else { case.spec.dtype.word_bytes() };
    let out_at = words.as_mut_ptr() as u64 + shift as u64;
    let base_at = base.as_mut_ptr() as u64;
    let bytes = |at: u64, count: usize| {
        // SAFETY: inside of the vectors above, which live on; nothing else refers to them meanwhile.
        unsafe {
            std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut::<u8>(at as usize), count)
        }
    };
    let _ = (words.as_mut_ptr().expose_provenance(), base.as_mut_ptr().expose_provenance());
    bytes(base_at, case.base.len()).copy_from_slice(&case.base);
    let target = bytes(out_at, case.last.len());
    target.fill(0xcd);
    let base_at = if in_place {
        target.copy_from_slice(&case.base);
        out_at
    } else {
        base_at
    };
    let job = Job {
        segment: &flat,
        base: base_at,
        out: out_at,
        blob: blob.as_ptr() as u64 + 3,
        index: index.as_ptr() as u64,
    };
    let plan = Plan::new(&[job], 64 << 10);
    let (mut status, mut bitmap) = ([0u32; 4], vec![0u32; plan.bitmap_bytes() / 4 + 1]);
    // The lists hold addresses, so their records are 8-byte aligned.
    let segments: Vec<u64> =
        plan.segments.as_chunks::<8>().0.iter().map(|&b| u64::from_le_bytes(b)).collect();
    let places = Places {
        segments: segments.as_ptr() as u64,
        tables: tables.words().as_ptr() as u64,
        status: status.as_mut_ptr() as u64,
        bitmap: bitmap.as_mut_ptr() as u64,
    };
    for step in &plan.launches {
        if step.family == Family::Check && !check {
            continue;
        }
        let args = step.arguments(&places, capacity_bytes, 0);
        launch(library, &step.kernel, [step.blocks, step.threads], &args);
        if status[0] != 0 {
            return Err(status[0]);
        }
    }
    for whole in &plan.whole {
        assert_eq!(whole.job, 0);
        let from = if case.spec.base == BaseKind::None { 0 } else { base_at };
        let args = [Arg::U64(out_at), Arg::U64(from), Arg::U64(case.last.len() as u64)];
        launch(library, "tpde_whole", [2, THREADS], &args);
    }
    if status[2] != 0 || !plan.host.is_empty() {
        let left: Vec<u8> = bitmap.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(plan.left(&left, &left).len(), status[2] as usize);
        return Ok(None);
    }
    Ok(Some(bytes(out_at, case.last.len()).to_vec()))
}

fn check(library: &Library, case: &Case) -> bool {
    let in_place_too = case.spec.base == BaseKind::Words;
    let mut decoded = false;
    for in_place in [false, true].into_iter().take(1 + usize::from(in_place_too)) {
        match decode(library, case, in_place, true, 160 << 10) {
            Err(code) => panic!("{}: status {code}", case.label),
            Ok(None) => {}
            Ok(Some(made)) => {
                let differ = made.iter().zip(&case.last).position(|(a, b)| a != b);
                assert_eq!(differ, None, "{}, in place: {in_place}", case.label);
                decoded = true;
            }
        }
    }
    decoded
}

#[test]
fn goldens_decode() {
    let Some(emulator) = emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let mut decoded = 0;
    for case in goldens() {
        let was = check(&library, &case);
        assert!(
            was || case.is_for_the_host() || case.has_many_symbols(),
            "{} was left to the host",
            case.label
        );
        decoded += u32::from(was);
    }
    assert!(decoded > 25, "{decoded} goldens decoded");
}

#[test]
fn random_segments_decode() {
    let Some(emulator) = emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let count = std::env::var("OVERSPILL_SEGMENTS").map_or(60, |text| text.parse().expect("a number"));
    let decoded = (0..count).filter(|&seed| check(&library, &random(seed, 60_000))).count();
    eprintln!("{decoded} of {count} decoded by kernels");
    assert!(decoded * 10 > count as usize * 7);
}

#[test]
fn a_step_of_training_fits_the_usual_block() {
    let Some(emulator) = emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let (old, new) = training_step(7, 5.2e-7, 1 << 17);
    let options = EncodeOptions { row_words: 4096, ..EncodeOptions::default() };
    let case = Case::encode("a step".into(), Base::Words(&old), new, Dtype::Bf16, &options);
    assert_eq!(case.index.len(), RECORD_BYTES, "one chunk of 2^17 words");
    assert_eq!(decode(&library, &case, true, false, USUAL_SPARSE_BYTES), Ok(Some(case.last.clone())));
}

#[test]
fn a_step_of_training_is_flagged() {
    let Some(emulator) = emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    // Several chunks, the last one of a group and a part.
    let (old, new) = training_step(7, 5.2e-7, (1 << 18) + 5000);
    let options = EncodeOptions { codec: CodecChoice::Gpu, ..EncodeOptions::default() };
    let case = Case::encode("a step".into(), Base::Words(&old), new, Dtype::Bf16, &options);
    assert!(case.index.len() > RECORD_BYTES && case.blob[0] == ChunkMode::Flags as u8);
    assert_eq!(decode(&library, &case, true, true, 0), Ok(Some(case.last.clone())));
    assert_eq!(decode(&library, &case, false, true, 0), Ok(Some(case.last.clone())));
}

#[test]
fn what_does_not_fit_is_left_untouched() {
    let Some(emulator) = emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let case =
        (0..).map(|seed| random(seed, 60_000)).find(|case| case.blob.len() > 4000 && case.blob[0] == 2);
    let case = case.expect("a sparse one");
    assert_eq!(decode(&library, &case, false, true, 600), Ok(None));
}

/// Packs and unpacks with the kernels; the payload must be the reference's, as blocks run in order here.
fn check_link(library: &Library, format: LinkFormat, bytes: &[u8]) {
    let name = if format == LinkFormat::Bf16 { "bf16" } else { "f16" };
    let count = bytes.len() / 2;
    let chunks = count.div_ceil(LINK_CHUNK_WORDS);
    // 16-byte aligned, as device memory is.
    let mut words = vec![0u128; bytes.len() / 16 + 2];
    let mut payload = vec![0u128; format.payload_bound_bytes(count) / 16 + 1];
    let (mut records, mut units, mut status) = (vec![[0u32; 2]; chunks], 0u32, 0u32);
    let words_at = words.as_mut_ptr().expose_provenance();
    let view = |count: usize| {
        // SAFETY: inside of `words`, which lives on; only one view is used at a time.
        unsafe {
            std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut::<u8>(words_at), count)
        }
    };
    view(bytes.len()).copy_from_slice(bytes);
    let payload_at = payload.as_mut_ptr() as u64;
    let [words_arg, count_arg, payload_arg] = [words_at as u64, count as u64, payload_at].map(Arg::U64);
    let (records_arg, units_arg) = (Arg::U64(records.as_mut_ptr() as u64), Arg::U64(&raw mut units as u64));
    let args = [words_arg, count_arg, payload_arg, records_arg, units_arg];
    launch(library, &format!("link_encode_{name}"), [chunks as u32, THREADS], &args);
    let mut heard = 0u32;
    launch(library, "link_publish", [1, 1], &[units_arg, Arg::U64(&raw mut heard as u64)]);
    assert_eq!(heard, units);
    let expected = link_encode(format, bytes).expect("packs");
    let made: Vec<u8> =
        payload.iter().flat_map(|unit| unit.to_le_bytes()).take(units as usize * 16).collect();
    assert_eq!(records, expected.records);
    assert!(made == expected.payload, "another payload");
    view(bytes.len() + 2).fill(0xee);
    let args = [
        words_arg,
        count_arg,
        payload_arg,
        Arg::U64(u64::from(units) * 16),
        records_arg,
        Arg::U64(&raw mut status as u64),
    ];
    launch(library, &format!("link_decode_{name}"), [chunks as u32, THREADS], &args);
    assert_eq!(status, 0);
    assert!(view(bytes.len()) == bytes, "words differ");
    assert_eq!(view(bytes.len() + 2)[bytes.len()..], [0xee; 2]);
    // A record that points beyond the payload is reported, and nothing of its chunk written.
    if let Some(record) = records.first_mut() {
        record[0] = units + 1;
        view(bytes.len()).fill(0xee);
        launch(library, &format!("link_decode_{name}"), [1, THREADS], &args);
        assert_eq!((status, view(1)[0]), (1, 0xee));
    }
}

#[test]
fn the_link_codec_packs_what_the_reference_packs() {
    let Some(emulator) = link_emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rng = fastrand::Rng::with_seed(3);
    for format in [LinkFormat::Bf16, LinkFormat::F16] {
        for (count, spread) in
            [(1usize, 1u32), (9, 3), (8191, 8), (8192, 3), (20_001, 30), (30_000, 9), (9000, 200)]
        {
            let zeros = rng.bool();
            let shift = if format == LinkFormat::Bf16 { 7 } else { 10 };
            let word = |rng: &mut fastrand::Rng| {
                let below = (0..spread).take_while(|_| rng.bool()).count() as u16;
                let top = if format == LinkFormat::Bf16 { 120 } else { 20 };
                let made = rng.u16(..) & !(if shift == 7 { 0x7f80 } else { 0x7c00 })
                    | (top - below.min(top)) << shift;
                if zeros && rng.u8(..4) == 0 { 0 } else { made }
            };
            let bytes: Vec<u8> = (0..count).flat_map(|_| word(&mut rng).to_le_bytes()).collect();
            check_link(&library, format, &bytes);
        }
        let noise: Vec<u8> = (0..40_002).map(|_| rng.u8(..)).collect();
        check_link(&library, format, &noise);
    }
}

/// Rounds to the nearest bf16, ties to even, as the device does; its NaN is one.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fff;
    }
    ((u64::from(bits) + 0x7fff + u64::from(bits >> 16 & 1)) >> 16) as u16
}

fn wide(word: u16) -> f32 {
    f32::from_bits(u32::from(word) << 16)
}

fn halves(words: &[u128]) -> Vec<u16> {
    let bytes = words.iter().flat_map(|unit| unit.to_le_bytes()).collect::<Vec<u8>>();
    bytes.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word)).collect()
}

#[test]
fn a_norm_is_rebuilt_as_its_operations_round_it() {
    let Some(emulator) = REBUILD_EMULATOR.get_or_init(|| compile(&kernels::REBUILD)).as_ref() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rng = fastrand::Rng::with_seed(5);
    for (rows, columns) in [(1usize, 8usize), (3, 64), (2, 4104)] {
        // 16-byte aligned, as device memory is; any bits, so also NaNs, infinities and subnormals.
        let words = |rng: &mut fastrand::Rng, count: usize| -> Vec<u128> {
            (0..count / 8).map(|_| rng.u128(..)).collect()
        };
        let (narrow, weight) = (words(&mut rng, rows * columns), words(&mut rng, columns));
        let scale: Vec<f32> = (0..rows).map(|_| rng.f32() * 3.0).collect();
        let mut made =
            [vec![0u128; rows * columns / 4], vec![0; rows * columns / 8], vec![0; rows * columns / 8]];
        let at = |words: &[u128]| Arg::U64(words.as_ptr() as u64);
        let args = [
            at(&narrow),
            Arg::U64(scale.as_ptr() as u64),
            at(&weight),
            Arg::U32(columns as u32),
            Arg::U64(made[0].as_mut_ptr() as u64),
            Arg::U64(made[1].as_mut_ptr() as u64),
            Arg::U64(made[2].as_mut_ptr() as u64),
        ];
        launch(&library, "norm_again_bf16", [rows as u32, THREADS], &args);
        let first = made.clone();
        made[1].fill(0);
        made[2].fill(0);
        let from_wide = [&[Arg::U64(0)], &args[1..]].concat();
        launch(&library, "norm_again_bf16", [rows as u32, THREADS], &from_wide);
        assert!(made == first, "another result from the wide input");
        let (narrow, weight) = (halves(&narrow), halves(&weight));
        let (normal, weighted) = (halves(&made[1]), halves(&made[2]));
        let wides = halves(&made[0]);
        for index in 0..rows * columns {
            let input = wide(narrow[index]);
            let bits = u32::from(wides[2 * index]) | u32::from(wides[2 * index + 1]) << 16;
            assert_eq!(bits, input.to_bits(), "wide {index} of {rows} x {columns}");
            let expected = bf16(input * scale[index / columns]);
            assert_eq!(normal[index], expected, "normal {index} of {rows} x {columns}");
            let product = bf16(wide(weight[index % columns]) * wide(expected));
            assert_eq!(weighted[index], product, "weighted {index} of {rows} x {columns}");
        }
    }
}

#[test]
fn a_gate_is_rebuilt_as_its_operations_round_it() {
    let Some(emulator) = REBUILD_EMULATOR.get_or_init(|| compile(&kernels::REBUILD)).as_ref() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rng = fastrand::Rng::with_seed(6);
    for count in [8usize, 2048, 2056, 30_000] {
        let words: Vec<u128> = (0..count / 4).map(|_| rng.u128(..)).collect();
        let (gates, ups) = words.split_at(count / 8);
        let (mut silu, mut product) = (vec![0u128; count / 8], vec![0u128; count / 8]);
        let args = [
            gates.as_ptr() as u64,
            ups.as_ptr() as u64,
            count as u64,
            silu.as_mut_ptr() as u64,
            product.as_mut_ptr() as u64,
        ];
        let blocks = (count as u32 / 8).div_ceil(THREADS);
        launch(&library, "gate_again_bf16", [blocks, THREADS], &args.map(Arg::U64));
        let [gates, ups, silu, product] = [gates, ups, &silu, &product].map(halves);
        for index in 0..count {
            let value = wide(gates[index]);
            let expected = bf16(value / (1.0 + (-value).exp()));
            assert_eq!(silu[index], expected, "silu {index} of {count}");
            assert_eq!(product[index], bf16(wide(expected) * wide(ups[index])), "product {index} of {count}");
        }
    }
}

/// Packs a case with the kernels: head, records' bytes, blob. `None` if it is the host's.
fn pack(library: &Library, case: &Case, mode: PackMode, capacity_bytes: u32) -> Option<[Vec<u8>; 3]> {
    let aligned = |bytes: &[u8]| {
        let mut words: Vec<u128> = bytes
            .chunks(16)
            .map(|chunk| {
                let mut word = [0; 16];
                word[..chunk.len()].copy_from_slice(chunk);
                u128::from_le_bytes(word)
            })
            .collect();
        words.push(0);
        words
    };
    let (base, last) = (aligned(&case.base), aligned(&case.last));
    let job = PackJob { spec: case.spec, base: base.as_ptr() as u64, last: last.as_ptr() as u64 };
    if !job.is_for_kernels() {
        return None;
    }
    let bits = 8 * case.spec.dtype.word_bytes();
    let counts = CountPlan::new(&[job]);
    let aligned_list = |bytes: &[u8]| -> Vec<u64> {
        bytes.as_chunks::<8>().0.iter().map(|&b| u64::from_le_bytes(b)).collect()
    };
    let segments = aligned_list(&counts.segments);
    let (mut cells, mut list) = (vec![0u64; CELLS.div_ceil(2)], vec![0u32; LIST_WORDS]);
    let mut grains = vec![0u32; counts.grain_count()];
    let at = |words: &mut [u32]| Arg::U64(words.as_mut_ptr() as u64);
    let cells_at = cells.as_mut_ptr() as u64;
    let args = [Arg::U64(segments.as_ptr() as u64), Arg::U32(1), at(&mut grains), Arg::U64(cells_at)];
    launch(library, &format!("tpde_count_{bits}"), [grains.len() as u32, COUNT_THREADS], &args);
    let args = [Arg::U64(cells_at), at(&mut list), Arg::U32(LISTED as u32)];
    launch(library, "tpde_list", [1, COUNT_THREADS], &args);
    let head = counts.head(0, &job, mode, &list, &grains)?;
    let grains_at = grains.as_ptr() as u64;
    let mut plan = ChunkPlan::new(mode.chunks_a_block());
    plan.add(&[job], &[Some(head.clone())], &counts, grains_at).expect("the head parses");
    let chunks = plan.chunk_count() as usize;
    let (mut outcomes, mut status) = (vec![0u32; OUTCOME_WORDS * chunks], [0u32; 4]);
    let (mut bitmap, mut cursor) = (vec![0u32; chunks.div_ceil(32)], [0u32]);
    let mut scratch = vec![0u32; case.last.len() / 2 + 1024];
    let (mut blob, mut places) = (vec![0u8; case.last.len() * 2 + 4096], Vec::new());
    if chunks > 0 {
        let segments = aligned_list(&plan.segments);
        let units = scratch.len() as u32;
        let front = [
            Arg::U64(segments.as_ptr() as u64),
            Arg::U32(plan.count),
            Arg::U64(plan.tables.words().as_ptr() as u64),
        ];
        let rest = [
            at(&mut cursor),
            at(&mut scratch),
            Arg::U32(units),
            at(&mut outcomes),
            at(&mut status),
            at(&mut bitmap),
        ];
        let (name, room) = match mode {
            PackMode::Sparse => ("encode", Some(Arg::U32(capacity_bytes))),
            PackMode::Flags => ("encode_flags", None),
        };
        let args: Vec<Arg> = front.into_iter().chain(room).chain(rest).collect();
        launch(library, &format!("tpde_{name}_{bits}"), [plan.blocks, mode.threads()], &args);
    }
    if plan.is_left(0, &bitmap) {
        return None;
    }
    let records = plan.records(0, &outcomes, 0, &mut places);
    let args = [
        at(&mut outcomes),
        Arg::U64(places.as_ptr() as u64),
        Arg::U32(chunks as u32),
        at(&mut scratch),
        Arg::U64(blob.as_mut_ptr() as u64),
    ];
    launch(library, "tpde_gather", [chunks.div_ceil(8).max(1) as u32, COUNT_THREADS], &args);
    blob.truncate(records.last().map_or(0, |record| record.end_bytes as usize));
    Some([head, records.iter().flat_map(|record| record.to_bytes()).collect(), blob])
}

/// As [`pack`] for a case without a base.
fn pack_planes(library: &Library, case: &Case) -> Option<[Vec<u8>; 3]> {
    let mut last: Vec<u128> = vec![0; case.last.len() / 16 + 2];
    // Off by a word where the label says so.
    let width = case.spec.dtype.word_bytes();
    let shift = if case.label.len().is_multiple_of(2) { 0 } else { width };
    let bytes: Vec<u8> = [&vec![0xee; shift], &case.last[..]].concat();
    for (word, bytes) in last.iter_mut().zip(bytes.chunks(16)) {
        let mut padded = [0xee; 16];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u128::from_le_bytes(padded);
    }
    let job = PackJob { spec: case.spec, base: 0, last: last.as_ptr() as u64 + shift as u64 };
    if !job.is_for_planes() {
        return None;
    }
    let bits = 8 * width;
    let list_of = |bytes: &[u8]| -> Vec<u64> {
        bytes.as_chunks::<8>().0.iter().map(|&b| u64::from_le_bytes(b)).collect()
    };
    let counts = CountPlan::new(&[job]);
    let segments = list_of(&counts.segments);
    let mut grains = vec![0u32; counts.grain_count()];
    let (mut cells, mut probe) = (vec![0u32; plane_cells(width)], vec![0u64; probe_bytes(width) / 8]);
    let at = |words: &mut [u32]| Arg::U64(words.as_mut_ptr() as u64);
    let segments_at = Arg::U64(segments.as_ptr() as u64);
    let args = [segments_at, Arg::U32(1), at(&mut grains), at(&mut cells)];
    launch(library, &format!("tpde_count_planes_{bits}"), [grains.len() as u32, COUNT_THREADS], &args);
    let args = [segments_at, at(&mut grains), Arg::U64(probe.as_mut_ptr() as u64)];
    launch(library, &format!("tpde_probe_{bits}"), [1, COUNT_THREADS], &args);
    let probe: Vec<u8> = probe.iter().flat_map(|word| word.to_le_bytes()).collect();
    let head = head_of_planes(&job, &grains, &cells, &probe)?;
    let mut plan = ChunkPlan::new(THREADS / 32);
    plan.add(&[job], &[Some(head.clone())], &counts, grains.as_ptr() as u64).expect("the head parses");
    let chunks = plan.chunk_count() as usize;
    let (mut outcomes, mut status) = (vec![0u32; OUTCOME_WORDS * chunks], [0u32; 4]);
    let (mut bitmap, mut places) = (vec![0u32; chunks.div_ceil(32)], vec![0u64; chunks]);
    let mut blob = vec![0xeeu8; case.last.len() + 4096];
    let segments = list_of(&plan.segments);
    let mut run = |kernel: &str, outcomes: &mut [u32], bitmap: &mut [u32], places: &[u64]| {
        let args = [
            Arg::U64(segments.as_ptr() as u64),
            Arg::U32(plan.count),
            Arg::U64(plan.tables.words().as_ptr() as u64),
            at(outcomes),
            Arg::U64(places.as_ptr() as u64),
            // The blob starts anywhere.
            Arg::U64(blob.as_mut_ptr() as u64 + 3),
            at(&mut status),
            at(bitmap),
        ];
        if chunks > 0 {
            launch(library, &format!("tpde_{kernel}_planes_{bits}"), [plan.blocks, THREADS], &args);
        }
    };
    run("size", &mut outcomes, &mut bitmap, &places);
    if plan.is_left(0, &bitmap) {
        return None;
    }
    places.clear();
    plan.records(0, &outcomes, 0, &mut places);
    run("encode", &mut outcomes, &mut bitmap, &places);
    let records = plan.records(0, &outcomes, 0, &mut places);
    let end = 3 + records.last().map_or(0, |record| record.end_bytes as usize);
    assert!(blob[..3] == [0xee; 3] && blob[end..].iter().all(|&byte| byte == 0xee), "{}", case.label);
    Some([head, records.iter().flat_map(|record| record.to_bytes()).collect(), blob[3..end].to_vec()])
}

#[test]
fn words_without_a_base_are_packed_as_the_reference_packs_them() {
    let Some(emulator) = encode_emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let mut packed = 0;
    for (seed, dtype, words) in [
        (1, Dtype::Bf16, 150_000),
        (2, Dtype::Bf16, 40_001),
        (3, Dtype::F32, 70_000),
        (4, Dtype::F8E4M3, 100_003),
        (5, Dtype::F16, 5_000),
        (6, Dtype::U8, 33_000),
        (7, Dtype::I32, 32_768),
        (8, Dtype::Bf16, 4_096),
        (9, Dtype::Bf16, 90_000),
    ] {
        let (_, new) = training_step(seed, 1e-6, words * dtype.word_bytes() / 2 + 1);
        let mut new = new[..words * dtype.word_bytes()].to_vec();
        if seed == 9 {
            // A chunk of zeros in front, and one that repeats itself behind.
            new[..2 << 15].fill(0);
        }
        for with_zeros in [false, true] {
            let case = Case::encode(
                format!("{seed}{}", if with_zeros { " zeros" } else { "" }),
                Base::None,
                new.clone(),
                dtype,
                &EncodeOptions::default(),
            );
            if let Some(made) = pack_planes(&library, &case) {
                assert!(
                    packed_as_reference(&case, &made),
                    "{}: other bytes than the reference's",
                    case.label
                );
                packed += 1;
            }
            let tenth = new.len() / 10;
            new[tenth..3 * tenth].fill(0);
        }
    }
    eprintln!("{packed} packed by kernels");
    assert!(packed >= 8, "{packed} packed");
}

#[test]
fn random_segments_are_packed_as_the_reference_packs_them() {
    let Some(emulator) = encode_emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let count = std::env::var("OVERSPILL_SEGMENTS").map_or(150, |text| text.parse().expect("a number"));
    let (mut packed, mut same) = (0, 0);
    for seed in 0..count {
        let case = random(seed, 60_000);
        let mode = if seed.is_multiple_of(3) { PackMode::Flags } else { PackMode::Sparse };
        if let Some(made) = pack(&library, &case, mode, PACK_BYTES) {
            packed += 1;
            let is_same = packed_as_reference(&case, &made);
            assert!(is_same || mode == PackMode::Sparse || case.mode() != "F", "{}", case.label);
            same += u32::from(is_same);
        }
    }
    eprintln!("{packed} of {count} packed by kernels, {same} of them the reference's bytes");
    assert!(packed >= 20 && same * 10 > packed * 8, "{packed} packed, {same} the same");
}

#[test]
fn a_step_of_training_is_packed_in_the_usual_room() {
    let Some(emulator) = encode_emulator() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let (old, new) = training_step(7, 5.2e-7, 1 << 17);
    let options = EncodeOptions { row_words: 4096, ..EncodeOptions::default() };
    let flags = EncodeOptions { codec: CodecChoice::Gpu, ..options };
    let case = Case::encode("a step".into(), Base::Words(&old), new.clone(), Dtype::Bf16, &flags);
    let made = pack(&library, &case, PackMode::Flags, 0).expect("packed");
    assert!(packed_as_reference(&case, &made), "other flags than the reference's");
    let case = Case::encode("a step".into(), Base::Words(&old), new, Dtype::Bf16, &options);
    let made = pack(&library, &case, PackMode::Sparse, PACK_BYTES).expect("packed");
    assert!(packed_as_reference(&case, &made), "other bytes than the reference's");
    // Nothing is packed where there is no room.
    assert!(pack(&library, &case, PackMode::Sparse, 12 << 10).is_none());
}

#[test]
fn segments_are_hashed_as_the_reference_hashes_them() {
    let Some(emulator) = STATE_EMULATOR.get_or_init(|| compile(&kernels::STATE)).as_ref() else { return };
    let library = emulator.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rng = fastrand::Rng::with_seed(11);
    let bytes: Vec<u8> = (0..400_000).map(|_| rng.u8(..)).collect();
    // Ends of stripes, of blocks and of batches of 64 blocks, and every alignment of a word.
    let lengths = [241, 256, 257, 1023, 1024, 1025, 1088, 2048, 65_535, 65_536, 65_537, 131_073, 197_640];
    let spans: Vec<Span> = (0..lengths.len() * 4)
        .map(|i| Span {
            addr: bytes.as_ptr() as u64 + if i < lengths.len() { 0 } else { rng.u64(..64) },
            bytes: lengths[i % lengths.len()],
        })
        .chain([Span { addr: bytes.as_ptr() as u64, bytes: 240 }])
        .collect();
    let list: Vec<u64> =
        state::list(&spans).as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word)).collect();
    assert_eq!(list.len(), 2 * (spans.len() - 1), "the short one is not the kernel's");
    let mut sums = vec![[0u64; 8]; list.len() / 2];
    let args = [Arg::U64(list.as_ptr() as u64), Arg::U64(sums.as_mut_ptr() as u64)];
    launch(&library, "state_sums", [sums.len() as u32, state::STATE_THREADS], &args);
    for (span, sums) in spans.iter().zip(&sums) {
        let start = (span.addr - bytes.as_ptr() as u64) as usize;
        let expected = hash_segment(&bytes[start..start + span.bytes]);
        assert_eq!(state::finished(sums, span.bytes), expected, "{} bytes from {start}", span.bytes);
    }
}
