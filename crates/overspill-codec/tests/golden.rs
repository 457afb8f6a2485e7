//! Golden segments of every format version: they decode to the words they were made from, for ever.
//!
//! A file holds, little endian: dtype, base kind (0 none, 1 words, 2 Q4_0, 3 Q4_1, 4 Q8_0) and patch kind (1
//! absolute), a byte each; u32 words; u64 row words; u64 first word; then base, final, head, index and blob, each
//! after its u32 length. `OVERSPILL_WRITE_GOLDENS=1 cargo test -p overspill-codec --test golden` writes those of the
//! present version; files of released versions are never written again.

use std::path::PathBuf;

use overspill_codec::*;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// What a golden file holds.
struct Golden {
    spec: SegmentSpec,
    sections: [Vec<u8>; 5],
}

impl Golden {
    fn to_bytes(&self) -> Vec<u8> {
        let base = match self.spec.base {
            BaseKind::None => 0,
            BaseKind::Words => 1,
            BaseKind::Quantized(QuantLayout::Q4_0) => 2,
            BaseKind::Quantized(QuantLayout::Q4_1) => 3,
            BaseKind::Quantized(QuantLayout::Q8_0) => 4,
        };
        let mut out = vec![self.spec.dtype.code(), base, (self.spec.kind == PatchKind::Absolute).into()];
        out.extend_from_slice(&(self.spec.words as u32).to_le_bytes());
        out.extend_from_slice(&self.spec.row_words.to_le_bytes());
        out.extend_from_slice(&self.spec.first_word.to_le_bytes());
        for section in &self.sections {
            out.extend_from_slice(&(section.len() as u32).to_le_bytes());
            out.extend_from_slice(section);
        }
        out
    }

    fn from_bytes(mut bytes: &[u8]) -> Self {
        let mut take = |count: usize| {
            let (front, rest) = bytes.split_at(count);
            bytes = rest;
            front
        };
        let u64_of = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let u32_of = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap()) as usize;
        let codes = take(3);
        let base = [
            BaseKind::None,
            BaseKind::Words,
            BaseKind::Quantized(QuantLayout::Q4_0),
            BaseKind::Quantized(QuantLayout::Q4_1),
            BaseKind::Quantized(QuantLayout::Q8_0),
        ][usize::from(codes[1])];
        let spec = SegmentSpec {
            dtype: Dtype::from_code(codes[0]).unwrap(),
            kind: if codes[2] == 1 { PatchKind::Absolute } else { PatchKind::Relative },
            base,
            words: u32_of(take(4)),
            row_words: u64_of(take(8)),
            first_word: u64_of(take(8)),
        };
        let sections = std::array::from_fn(|_| {
            let length = u32_of(take(4));
            take(length).to_vec()
        });
        Golden { spec, sections }
    }
}

/// Words of a float-like distribution, with zeros of both signs, NaN payloads, infinities and subnormals among them.
fn words(rng: &mut fastrand::Rng, count: usize, dtype: Dtype) -> Vec<u8> {
    let mut bytes = Vec::new();
    for i in 0..count {
        let value = ((0..4).map(|_| rng.f64()).sum::<f64>() - 2.0) * 0.1;
        let special = [0x8000_0000u32, 0, 0x7fc1_2345, 0xff80_0000, 0x7f80_0000, 0x0001_0000, 0xffff_ffff];
        let bits = if i % 97 == 0 { special[i / 97 % 7] } else { (value as f32).to_bits() };
        match dtype {
            Dtype::F64 => bytes.extend_from_slice(&value.to_le_bytes()),
            Dtype::F32 => bytes.extend_from_slice(&bits.to_le_bytes()),
            Dtype::Bf16 => bytes.extend_from_slice(&((bits >> 16) as u16).to_le_bytes()),
            Dtype::F16 => bytes.extend_from_slice(&((bits >> 13) as u16).to_le_bytes()),
            _ => bytes.extend((0..dtype.word_bytes()).map(|_| rng.u8(..))),
        }
    }
    bytes
}

fn inputs() -> Vec<(String, Golden)> {
    let mut goldens = Vec::new();
    let shares = [("sparse", 0.02), ("mixed", 0.15), ("dense", 0.8)];
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F64, Dtype::F8E4M3, Dtype::I32, Dtype::Bool] {
        for (name, share) in shares {
            println!("seed 42");
            let mut rng = fastrand::Rng::with_seed(42);
            let old = words(&mut rng, 1600, dtype);
            let mut new = old.clone();
            for (i, word) in new.chunks_exact_mut(dtype.word_bytes()).enumerate() {
                if rng.f64() < share && !(300..700).contains(&i) {
                    word[0] = word[0].wrapping_add(rng.u8(1..4));
                }
            }
            let auto = EncodeOptions { row_words: 50, first_word: 10, ..EncodeOptions::default() };
            let mut add = |label: &str, source: Base<'_>, options: EncodeOptions| {
                goldens.push((
                    format!("v1-{}-{name}-{label}", dtype.name().to_lowercase()),
                    encode(source, &new, dtype, options),
                ));
            };
            add("relative", Base::Words(&old), auto);
            add("gpu", Base::Words(&old), EncodeOptions { codec: CodecChoice::Gpu, ..auto });
            if dtype == Dtype::Bf16 {
                add("absolute", Base::Words(&old), EncodeOptions { kind: PatchKind::Absolute, ..auto });
                add("elias", Base::Words(&old), EncodeOptions { codec: CodecChoice::EliasZstd, ..auto });
            }
            if name == "dense" {
                add("standalone", Base::None, auto);
                for (label, layout) in
                    [("q4_0", QuantLayout::Q4_0), ("q4_1", QuantLayout::Q4_1), ("q8_0", QuantLayout::Q8_0)]
                {
                    if let Ok(blocks) = quantize(layout, &new, dtype) {
                        add(label, Base::Quantized(layout, &blocks), auto);
                    }
                }
            }
        }
    }
    goldens
}

fn encode(source: Base<'_>, new: &[u8], dtype: Dtype, options: EncodeOptions) -> Golden {
    let encoded = encode_segment(source, new, dtype, &options).unwrap();
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
    let index = encoded.index_bytes();
    Golden { spec, sections: [base, new.to_vec(), encoded.head, index, encoded.blob] }
}

#[test]
fn golden_segments_decode() {
    if std::env::var_os("OVERSPILL_WRITE_GOLDENS").is_some() {
        std::fs::create_dir_all(folder()).unwrap();
        for (name, golden) in inputs() {
            std::fs::write(folder().join(name + ".bin"), golden.to_bytes()).unwrap();
        }
    }
    let mut modes = [0; ChunkMode::ALL.len()];
    let mut files = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let Golden { spec, sections: [base, new, head, index, blob] } =
            Golden::from_bytes(&std::fs::read(&path).unwrap());
        let source = match spec.base {
            BaseKind::None => Base::None,
            BaseKind::Words => Base::Words(&base),
            BaseKind::Quantized(layout) => Base::Quantized(layout, &base),
        };
        let (mut heads, mut records, mut payloads) = (&head[..], &index[..], &blob[..]);
        let view = SegmentView::take(spec, &mut heads, &mut records, &mut payloads).unwrap();
        assert!(heads.is_empty() && records.is_empty() && payloads.is_empty());
        let mut out = vec![0; new.len()];
        view.decode(source, &mut out).unwrap();
        assert!(out == new, "{}", path.display());
        (0..view.chunks()).for_each(|chunk| modes[view.mode(chunk).unwrap() as usize] += 1);
        files += 1;
    }
    println!("{files} golden files, chunks by mode {modes:?}");
    for mode in ChunkMode::ALL {
        assert!(
            mode < ChunkMode::Sparse || modes[mode as usize] > 0,
            "no golden chunk of mode {}",
            mode.name()
        );
    }
}
