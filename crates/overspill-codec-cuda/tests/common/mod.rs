//! Segments to decode, and what the reference makes of them.

use std::path::PathBuf;

use overspill_codec::*;

/// One encoded segment, its base and its final words.
pub struct Case {
    pub label: String,
    pub spec: SegmentSpec,
    pub base: Vec<u8>,
    pub last: Vec<u8>,
    pub head: Vec<u8>,
    pub index: Vec<u8>,
    pub blob: Vec<u8>,
}

impl Case {
    pub fn flat(&self, tables: &mut FlatTables) -> FlatSegment {
        let (mut head, mut index) = (self.head.as_slice(), self.index.as_slice());
        let flat = tables.take(self.spec, &mut head, &mut index).expect("parses");
        assert!(head.is_empty() && index.is_empty());
        flat
    }

    /// Name of its first chunk's mode.
    pub fn mode(&self) -> &'static str {
        let (mut head, mut index, mut blob) = (&self.head[..], &self.index[..], &self.blob[..]);
        let view = SegmentView::take(self.spec, &mut head, &mut index, &mut blob).expect("parses");
        view.mode(0).map_or("none", ChunkMode::name)
    }

    /// Whether some chunk of mode S may have more symbols than a block of the GPU holds.
    pub fn has_many_symbols(&self) -> bool {
        const SYMBOLS: usize = 20_000;
        let (mut head, mut index, mut blob) = (&self.head[..], &self.index[..], &self.blob[..]);
        let view = SegmentView::take(self.spec, &mut head, &mut index, &mut blob).expect("parses");
        let large =
            |chunk| view.mode(chunk) == Ok(ChunkMode::Sparse) && view.chunk_words(chunk).len() > SYMBOLS;
        (0..view.chunks()).any(large)
    }

    pub fn encode(
        label: String,
        base: Base<'_>,
        last: Vec<u8>,
        dtype: Dtype,
        options: &EncodeOptions,
    ) -> Self {
        let encoded = encode_segment(base, &last, dtype, options).expect("encodes");
        let bytes = match base {
            Base::None => &[],
            Base::Words(bytes) | Base::Quantized(_, bytes) => bytes,
        };
        Case {
            label,
            spec: SegmentSpec {
                dtype,
                words: last.len() / dtype.word_bytes(),
                row_words: options.row_words,
                first_word: options.first_word,
                base: base.kind(),
                kind: options.kind,
            },
            base: bytes.to_vec(),
            last,
            index: encoded.index_bytes(),
            head: encoded.head,
            blob: encoded.blob,
        }
    }

    /// Whether kernels must leave some of it: words of 64 bits, mode elias-zstd, quantized words without a change.
    pub fn is_for_the_host(&self) -> bool {
        let (mut head, mut index, mut blob) = (&self.head[..], &self.index[..], &self.blob[..]);
        let view = SegmentView::take(self.spec, &mut head, &mut index, &mut blob).expect("parses");
        let elias = |chunk| view.mode(chunk) == Ok(ChunkMode::EliasZstd);
        self.spec.dtype.word_bytes() == 8
            || (0..view.chunks()).any(elias)
            || matches!(self.spec.base, BaseKind::Quantized(_)) && view.chunks() == 0
    }
}

/// Whether what kernels packed is what the reference packed; it must decode to the same words in any case.
pub fn packed_as_reference(case: &Case, [head, index, blob]: &[Vec<u8>; 3]) -> bool {
    let (mut head_left, mut index_left, mut blob_left) = (&head[..], &index[..], &blob[..]);
    let view = SegmentView::take(case.spec, &mut head_left, &mut index_left, &mut blob_left)
        .unwrap_or_else(|error| panic!("{}: {error}", case.label));
    assert!(head_left.is_empty() && index_left.is_empty() && blob_left.is_empty(), "{}", case.label);
    let mut made = vec![0; case.last.len()];
    let base = if case.spec.base == BaseKind::None { Base::None } else { Base::Words(&case.base) };
    view.decode(base, &mut made).unwrap_or_else(|error| panic!("{}: {error}", case.label));
    let differ = made.iter().zip(&case.last).position(|(a, b)| a != b);
    assert_eq!(differ, None, "{}", case.label);
    (head, index, blob) == (&case.head, &case.index, &case.blob)
}

/// Every golden segment of the codec; `OVERSPILL_GOLDENS` names their folder where the sources are not.
pub fn goldens() -> Vec<Case> {
    let folder = match std::env::var_os("OVERSPILL_GOLDENS") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../overspill-codec/tests/golden"),
    };
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("goldens").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    files
        .iter()
        .map(|path| golden(path.display().to_string(), &std::fs::read(path).expect("readable")))
        .collect()
}

fn golden(label: String, mut bytes: &[u8]) -> Case {
    let mut take = |count: usize| {
        let (front, rest) = bytes.split_at(count);
        bytes = rest;
        front
    };
    let u64_of = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    let u32_of = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("4 bytes")) as usize;
    let codes = take(3);
    let quantized = [QuantLayout::Q4_0, QuantLayout::Q4_1, QuantLayout::Q8_0].map(BaseKind::Quantized);
    let spec = SegmentSpec {
        dtype: Dtype::from_code(codes[0]).expect("a dtype"),
        kind: if codes[2] == 1 { PatchKind::Absolute } else { PatchKind::Relative },
        base: [BaseKind::None, BaseKind::Words, quantized[0], quantized[1], quantized[2]]
            [usize::from(codes[1])],
        words: u32_of(take(4)),
        row_words: u64_of(take(8)),
        first_word: u64_of(take(8)),
    };
    let [base, last, head, index, blob] = std::array::from_fn(|_| {
        let length = u32_of(take(4));
        take(length).to_vec()
    });
    Case { label, spec, base, last, head, index, blob }
}

/// N(0, 1).
pub fn normal(rng: &mut fastrand::Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f32()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.f32()).cos()
}

/// Rounded to nearest, ties to even.
pub fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).to_le_bytes()[..2].try_into().expect("two bytes")
}

/// Random weights N(0, 0.02) under fp32 masters, and a step of `lr` in a random direction.
pub fn training_step(seed: u64, lr: f32, words: usize) -> (Vec<u8>, Vec<u8>) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut old, mut new) = (Vec::with_capacity(2 * words), Vec::with_capacity(2 * words));
    for _ in 0..words {
        let master = 0.02 * normal(&mut rng);
        let moved = if rng.bool() { master + lr } else { master - lr };
        old.extend_from_slice(&bf16(master));
        new.extend_from_slice(&bf16(moved));
    }
    (old, new)
}

fn weight(rng: &mut fastrand::Rng) -> f32 {
    ((0..4).map(|_| rng.f32()).sum::<f32>() - 2.0) * 0.05
}

fn store(dtype: Dtype, value: f32, out: &mut Vec<u8>) {
    match dtype {
        Dtype::F32 | Dtype::I32 => out.extend_from_slice(&value.to_le_bytes()),
        Dtype::Bf16 => out.extend_from_slice(&value.to_le_bytes()[2..]),
        Dtype::F16 => {
            // Close enough to a conversion: exponents and mantissas of the right shape.
            let bits = value.to_bits();
            let half = (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3_ffff).wrapping_sub(112 << 10) & 0x7fff);
            out.extend_from_slice(&(half as u16).to_le_bytes());
        }
        _ => out.push((value.to_bits() >> 20) as u8 & 0x7f | (value.to_bits() >> 24) as u8 & 0x80),
    }
}

/// A random segment of up to `words_most` words.
pub fn random(seed: u64, words_most: usize) -> Case {
    let mut rng = fastrand::Rng::with_seed(seed);
    let dtype =
        rng.choice([Dtype::Bf16, Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::I32, Dtype::U8]);
    let dtype = dtype.expect("one of them");
    let base_kind = rng.u8(..8);
    let mut words = rng.usize(1..=words_most);
    let row_words = *rng.choice([0usize, 64, 96, 500, 1024].iter()).expect("one");
    let quantize_to = match (base_kind, dtype) {
        (0..3, Dtype::Bf16 | Dtype::F16 | Dtype::F32) => {
            words = words.next_multiple_of(32);
            Some([QuantLayout::Q4_0, QuantLayout::Q4_1, QuantLayout::Q8_0][usize::from(base_kind)])
        }
        _ => None,
    };
    let mut old = Vec::new();
    for _ in 0..words {
        let scale = if rng.u8(..) == 0 { 1e-4 } else { 1.0 };
        store(dtype, weight(&mut rng) * scale, &mut old);
    }
    let width = dtype.word_bytes();
    let share = [0.0005, 0.01, 0.03, 0.2, 0.6][rng.usize(..5)];
    let (big, clustered, by_size) = (rng.u8(..4) == 0, rng.u8(..3) == 0, rng.bool());
    let mut new = old.clone();
    for (i, word) in new.chunks_exact_mut(width).enumerate() {
        let row = i.checked_div(row_words).unwrap_or(0);
        if clustered && (row * 2_654_435_761) >> 7 & 3 != 0 {
            continue;
        }
        // Small words change more often, as they do in training.
        let likely = if by_size && word[width - 1] & 0x7f > 0x3b { share * 0.05 } else { share };
        if rng.f64() < likely {
            let step = if big { rng.u32(..) >> rng.u32(16..32) } else { 1 + u32::from(rng.u8(..) < 20) };
            let mut wide = [0; 4];
            wide[..width].copy_from_slice(word);
            let wide = u32::from_le_bytes(wide);
            let made = if rng.bool() { wide.wrapping_add(step) } else { wide.wrapping_sub(step) };
            word.copy_from_slice(&made.to_le_bytes()[..width]);
        }
    }
    let options = EncodeOptions {
        kind: if quantize_to.is_none() && base_kind == 6 { PatchKind::Absolute } else { PatchKind::Relative },
        row_words: row_words as u64,
        first_word: if row_words == 0 { 0 } else { rng.u64(..5000) },
        codec: if seed.is_multiple_of(3) { CodecChoice::Gpu } else { CodecChoice::Auto },
        ..EncodeOptions::default()
    };
    let label = format!("seed {seed}: {} {words} words, base {base_kind}, {share}", dtype.name());
    match quantize_to {
        Some(layout) => {
            let blocks = quantize(layout, &new, dtype).expect("quantizes");
            Case::encode(label, Base::Quantized(layout, &blocks), new, dtype, &options)
        }
        None if base_kind == 7 => Case::encode(label, Base::None, new, dtype, &options),
        None => Case::encode(label, Base::Words(&old), new, dtype, &options),
    }
}
