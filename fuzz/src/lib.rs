//! What the fuzz targets share: small valid segments of every mode, and damage done to them.
//!
//! An input is a list of edits to a segment that was encoded once, or bytes that take the place of its head and
//! payload altogether; so the fuzzer reaches the depths of a decoder at once and still controls every byte.

use overspill_codec::{
    Base, BaseKind, ChunkMode, CodecChoice, Dtype, EncodeOptions, EncodedSegment, PatchKind, QuantLayout,
    SegmentSpec, encode_segment, quantize,
};

/// A small segment and everything needed to decode it.
pub struct Case {
    pub spec: SegmentSpec,
    pub base: Vec<u8>,
    pub new: Vec<u8>,
    pub encoded: EncodedSegment,
    pub index: Vec<u8>,
}

impl Case {
    pub fn source(&self) -> Base<'_> {
        match self.spec.base {
            BaseKind::None => Base::None,
            BaseKind::Words => Base::Words(&self.base),
            BaseKind::Quantized(layout) => Base::Quantized(layout, &self.base),
        }
    }

    fn new(source: Base<'_>, new: &[u8], dtype: Dtype, options: EncodeOptions) -> Self {
        let encoded = encode_segment(source, new, dtype, &options).expect("valid input");
        let base = match source {
            Base::None => vec![],
            Base::Words(bytes) | Base::Quantized(_, bytes) => bytes.to_vec(),
        };
        let spec = SegmentSpec {
            dtype,
            words: new.len() / dtype.word_bytes(),
            row_words: options.row_words,
            first_word: options.first_word,
            base: source.kind(),
            kind: options.kind,
        };
        Case { spec, base, new: new.to_vec(), index: encoded.index_bytes(), encoded }
    }
}

/// Words of a float-like distribution.
fn words(rng: &mut fastrand::Rng, count: usize, dtype: Dtype) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let bits = ((0..4).map(|_| rng.f64()).sum::<f64>() - 2.0) * 0.1;
        match dtype {
            Dtype::F64 => bytes.extend_from_slice(&bits.to_le_bytes()),
            Dtype::F32 => bytes.extend_from_slice(&(bits as f32).to_le_bytes()),
            Dtype::Bf16 => bytes.extend_from_slice(&(((bits as f32).to_bits() >> 16) as u16).to_le_bytes()),
            _ => bytes.push((bits * 100.0) as i8 as u8),
        }
    }
    bytes
}

/// Valid segments that hold a chunk of `mode`.
pub fn cases(mode: ChunkMode) -> Vec<Case> {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut cases = Vec::new();
    for dtype in [Dtype::Bf16, Dtype::F32, Dtype::F64, Dtype::U8] {
        for share in [0.03, 0.2, 0.9] {
            let base = words(&mut rng, 320, dtype);
            let mut new = base.clone();
            for word in new.chunks_exact_mut(dtype.word_bytes()).skip(60) {
                if rng.f64() < share {
                    word[0] = word[0].wrapping_add(rng.u8(1..6));
                }
            }
            for kind in [PatchKind::Relative, PatchKind::Absolute] {
                for codec in [CodecChoice::Auto, CodecChoice::EliasZstd, CodecChoice::Gpu] {
                    let options = EncodeOptions { kind, codec, row_words: 20, ..EncodeOptions::default() };
                    cases.push(Case::new(Base::Words(&base), &new, dtype, options));
                    cases.push(Case::new(Base::None, &new, dtype, options));
                }
            }
            if dtype == Dtype::Bf16 {
                for layout in [QuantLayout::Q4_0, QuantLayout::Q4_1, QuantLayout::Q8_0] {
                    let blocks = quantize(layout, &base, dtype).expect("whole blocks");
                    let source = Base::Quantized(layout, &blocks);
                    cases.push(Case::new(source, &new, dtype, EncodeOptions::default()));
                }
            }
        }
    }
    cases.retain(|case| case.encoded.stats.modes[mode as usize].chunks > 0);
    assert!(!cases.is_empty());
    cases
}

/// Apply edits of 3 bytes each (where, where, what) to `sections`, as if they were one run of bytes.
pub fn damage(mut edits: &[u8], sections: &mut [&mut Vec<u8>]) {
    let total: usize = sections.iter().map(|section| section.len()).sum();
    while let [low, high, what, rest @ ..] = edits {
        edits = rest;
        let mut at = usize::from(u16::from_le_bytes([*low, *high])) % total.max(1);
        for section in sections.iter_mut() {
            if at < section.len() {
                section[at] ^= *what;
                break;
            }
            at -= section.len();
        }
    }
}

/// Feed one input to the decoder of `mode`, past the payload check: it may refuse or return anything, not panic.
pub fn decode_damaged(cases: &[Case], mode: ChunkMode, input: &[u8]) {
    let [pick, how, rest @ ..] = input else { return };
    let case = &cases[usize::from(*pick) % cases.len()];
    let (mut head, mut blob) = (case.encoded.head.clone(), case.encoded.blob.clone());
    match how % 4 {
        0 => {
            blob.truncate(1);
            blob.extend_from_slice(rest);
        }
        1 => {
            let cut = usize::from(*how) % (rest.len() + 1);
            head.truncate(1);
            head.extend_from_slice(&rest[..cut]);
            blob = [&[mode as u8], &rest[cut..]].concat();
        }
        _ => damage(rest, &mut [&mut head, &mut blob]),
    }
    let mut out = vec![0; case.new.len()];
    let _ = overspill_codec::decode_unchecked(case.spec, case.source(), &head, &blob, &mut out);
}
