//! Every dtype, random segments: what comes out is what went in, bit for bit.

use overspill_codec::*;
use proptest::prelude::*;

fn roundtrip(source: Base<'_>, new: &[u8], dtype: Dtype, options: EncodeOptions) -> SegmentStats {
    let encoded = encode_segment(source, new, dtype, &options).expect("encode");
    let spec = SegmentSpec {
        dtype,
        words: new.len() / dtype.word_bytes(),
        row_words: options.row_words,
        first_word: options.first_word,
        base: source.kind(),
        kind: options.kind,
    };
    let index = encoded.index_bytes();
    let (mut heads, mut records, mut blob) = (&encoded.head[..], &index[..], &encoded.blob[..]);
    let view = SegmentView::take(spec, &mut heads, &mut records, &mut blob).expect("parse");
    assert!(heads.is_empty() && records.is_empty() && blob.is_empty());
    let mut out = vec![0xa5; new.len()];
    view.decode(source, &mut out).expect("decode");
    assert!(out == new, "{} out of place", dtype.name());
    let mut words = match source {
        Base::None => vec![0x5a; new.len()],
        Base::Words(bytes) => bytes.to_vec(),
        Base::Quantized(..) => {
            assert!(view.apply(&mut out).is_err(), "blocks cannot be patched in place");
            return encoded.stats;
        }
    };
    view.apply(&mut words).expect("apply");
    assert!(words == new, "{} in place", dtype.name());
    if options.kind == PatchKind::Absolute {
        view.apply(&mut words).expect("apply twice");
        assert!(words == new, "{} twice", dtype.name());
    }
    encoded.stats
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_dtype_comes_back(
        seed in any::<u64>(),
        words in 0usize..3000,
        share in prop::sample::select(vec![0.0, 0.001, 0.02, 0.2, 0.6, 1.0]),
        wide in any::<bool>(),
        absolute in any::<bool>(),
        elias in any::<bool>(),
    ) {
        for dtype in Dtype::all() {
            let mut rng = fastrand::Rng::with_seed(seed);
            let width = dtype.word_bytes();
            let base: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(words * width).collect();
            let mut new = base.clone();
            for word in new.chunks_exact_mut(width) {
                if rng.f64() < share {
                    if wide { word.fill_with(|| rng.u8(..)) } else { word[0] = word[0].wrapping_add(1) }
                }
            }
            let options = EncodeOptions {
                kind: if absolute { PatchKind::Absolute } else { PatchKind::Relative },
                codec: if elias { CodecChoice::EliasZstd } else { CodecChoice::Auto },
                row_words: 100,
                ..EncodeOptions::default()
            };
            roundtrip(Base::Words(&base), &new, dtype, options);
            roundtrip(Base::Words(&base), &new, dtype, EncodeOptions { codec: CodecChoice::Gpu, ..options });
            roundtrip(Base::None, &new, dtype, options);
        }
    }
}

/// Weights near a float scale, as bf16, f16 or f32 words.
fn weights(rng: &mut fastrand::Rng, count: usize, dtype: Dtype) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let normal = (0..6).map(|_| rng.f32()).sum::<f32>() / 3.0 - 1.0;
        let bits = (normal * 0.1).to_bits();
        match dtype {
            Dtype::F32 => bytes.extend_from_slice(&bits.to_le_bytes()),
            _ => bytes.extend_from_slice(&((bits >> 16) as u16).to_le_bytes()),
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn quantized_bases_come_back(seed in any::<u64>(), blocks in 1usize..200, noise in any::<bool>()) {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            for layout in [QuantLayout::Q4_0, QuantLayout::Q4_1, QuantLayout::Q8_0] {
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut new = weights(&mut rng, blocks * 32, dtype);
                let mut base = quantize(layout, &new, dtype).unwrap();
                if noise {
                    base.fill_with(|| rng.u8(..));
                    new[..16].fill_with(|| rng.u8(..));
                }
                roundtrip(Base::Quantized(layout, &base), &new, dtype, EncodeOptions::default());
                let exact = dequantize(layout, &base, dtype).unwrap();
                let stats = roundtrip(Base::Quantized(layout, &base), &exact, dtype, EncodeOptions::default());
                prop_assert_eq!(stats.changed, 0);
            }
        }
    }
}

/// Segments large enough for several chunks, dense classes and row context, of every kind of change.
#[test]
fn large_segments_use_every_mode() {
    let mut seen = [0u64; ChunkMode::ALL.len()];
    for seed in 0..12u64 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let dtype = if seed % 3 == 0 { Dtype::F32 } else { Dtype::Bf16 };
        let words = 300_000 + rng.usize(..5000);
        let base = weights(&mut rng, words, dtype);
        let mut new = base.clone();
        let width = dtype.word_bytes();
        let (row, live_rows) = (384, if seed % 2 == 0 { 0.1 } else { 1.0 });
        let share = [0.004, 0.1, 0.5][seed as usize % 3];
        let mut live = true;
        for (i, word) in new.chunks_exact_mut(width).enumerate() {
            if i % row == 0 {
                live = rng.f64() < live_rows;
            }
            let step = rng.u8(..20) / 10 + 1;
            if live && rng.f64() < share && (seed < 8 || i < words / 3) {
                word[0] = if rng.bool() { word[0].wrapping_add(step) } else { word[0].wrapping_sub(step) };
            }
        }
        for kind in [PatchKind::Relative, PatchKind::Absolute] {
            for (source, first_word) in [(Base::Words(&base), 0), (Base::Words(&base), 1000), (Base::None, 0)]
            {
                let options =
                    EncodeOptions { kind, row_words: row as u64, first_word, ..EncodeOptions::default() };
                let stats = roundtrip(source, &new, dtype, options);
                let flags =
                    roundtrip(source, &new, dtype, EncodeOptions { codec: CodecChoice::Gpu, ..options });
                for stats in [stats, flags] {
                    for (seen, mode) in seen.iter_mut().zip(stats.modes) {
                        *seen += mode.chunks;
                    }
                }
            }
        }
    }
    for mode in [
        ChunkMode::Zero,
        ChunkMode::Sparse,
        ChunkMode::Dense,
        ChunkMode::Planes,
        ChunkMode::Flags,
        ChunkMode::Groups,
    ] {
        assert!(seen[mode as usize] > 0, "{} was never chosen", mode.name());
    }
}
