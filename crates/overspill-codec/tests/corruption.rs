//! Damaged bytes: every bit flip and every truncation of small segments gives an error or the exact words, never a
//! panic and never wrong words.

use overspill_codec::*;

struct Case {
    name: &'static str,
    spec: SegmentSpec,
    base: Vec<u8>,
    new: Vec<u8>,
    encoded: EncodedSegment,
}

impl Case {
    fn source(&self) -> Base<'_> {
        match self.spec.base {
            BaseKind::None => Base::None,
            BaseKind::Words => Base::Words(&self.base),
            BaseKind::Quantized(layout) => Base::Quantized(layout, &self.base),
        }
    }

    /// Decode from damaged sections. An error stands for refusal; bytes left over count as one.
    fn decode(&self, heads: &[u8], index: &[u8], blob: &[u8]) -> Result<Vec<u8>, String> {
        let (mut heads, mut index, mut blob) = (heads, index, blob);
        let view =
            SegmentView::take(self.spec, &mut heads, &mut index, &mut blob).map_err(|e| e.to_string())?;
        if !(heads.is_empty() && index.is_empty() && blob.is_empty()) {
            return Err("bytes left over".into());
        }
        let mut out = vec![0; self.new.len()];
        view.decode(self.source(), &mut out).map_err(|e| e.to_string())?;
        Ok(out)
    }
}

/// Small segments that between them use every mode.
fn cases() -> Vec<Case> {
    println!("seed 17");
    let mut rng = fastrand::Rng::with_seed(17);
    let words: Vec<u8> = (0..700u32)
        .flat_map(|i| {
            let value = ((i as f32 * 0.7).sin() + 0.01) * 0.05 * (1.0 + rng.f32());
            ((value.to_bits() >> 16) as u16).to_le_bytes()
        })
        .collect();
    let mut sparse = words.clone();
    let mut dense = words.clone();
    for i in 0..700 {
        if i % 23 == 0 && i < 400 {
            sparse[i * 2] ^= 1 << (i % 2);
        }
        dense[i * 2] = dense[i * 2].wrapping_add(rng.u8(..3));
    }
    let blocks = quantize(QuantLayout::Q4_0, &words[..1280], Dtype::Bf16).unwrap();
    let auto = EncodeOptions { row_words: 20, ..EncodeOptions::default() };
    let gpu = EncodeOptions { codec: CodecChoice::Gpu, ..auto };
    let elias = EncodeOptions { codec: CodecChoice::EliasZstd, ..auto };
    let absolute = EncodeOptions { kind: PatchKind::Absolute, ..auto };
    let noise: Vec<u8> = (0..256).map(|_| rng.u8(..)).collect();
    let inputs = [
        ("S", Base::Words(&words), &sparse[..], Dtype::Bf16, auto, ChunkMode::Sparse),
        ("S absolute", Base::Words(&words), &sparse, Dtype::Bf16, absolute, ChunkMode::Sparse),
        ("D", Base::Words(&words), &dense, Dtype::Bf16, auto, ChunkMode::Dense),
        (
            "D quantized",
            Base::Quantized(QuantLayout::Q4_0, &blocks),
            &words[..1280],
            Dtype::Bf16,
            auto,
            ChunkMode::Dense,
        ),
        ("W", Base::None, &words, Dtype::Bf16, auto, ChunkMode::Planes),
        ("F", Base::Words(&words), &sparse, Dtype::Bf16, gpu, ChunkMode::Flags),
        ("G", Base::Words(&words), &dense[..], Dtype::Bf16, gpu, ChunkMode::Groups),
        ("elias-zstd", Base::Words(&words), &sparse, Dtype::Bf16, elias, ChunkMode::EliasZstd),
        ("raw", Base::None, &noise, Dtype::U8, auto, ChunkMode::Raw),
    ];
    inputs
        .into_iter()
        .map(|(name, source, new, dtype, options, mode)| {
            let encoded = encode_segment(source, new, dtype, &options).unwrap();
            assert!(encoded.stats.modes[mode as usize].chunks > 0, "{name}: {:?}", encoded.stats);
            let base = match source {
                Base::None => vec![],
                Base::Words(bytes) | Base::Quantized(_, bytes) => bytes.to_vec(),
            };
            let spec = SegmentSpec {
                dtype,
                words: new.len() / dtype.word_bytes(),
                row_words: options.row_words,
                first_word: 0,
                base: source.kind(),
                kind: options.kind,
            };
            Case { name, spec, base, new: new.to_vec(), encoded }
        })
        .collect()
}

#[test]
fn every_bit_flip_is_refused_or_harmless() {
    for case in cases() {
        let sections = [case.encoded.head.clone(), case.encoded.index_bytes(), case.encoded.blob.clone()];
        assert_eq!(case.decode(&sections[0], &sections[1], &sections[2]).as_ref(), Ok(&case.new));
        let mut refused = 0;
        for section in 0..3 {
            for bit in 0..sections[section].len() * 8 {
                let mut damaged = sections.clone();
                damaged[section][bit / 8] ^= 1 << (bit % 8);
                match case.decode(&damaged[0], &damaged[1], &damaged[2]) {
                    Ok(words) => assert!(words == case.new, "{}: section {section} bit {bit}", case.name),
                    Err(_) => refused += 1,
                }
            }
        }
        assert!(refused > 0);
    }
}

#[test]
fn every_truncation_is_refused() {
    for case in cases() {
        let sections = [case.encoded.head.clone(), case.encoded.index_bytes(), case.encoded.blob.clone()];
        for section in 0..3 {
            for length in 0..sections[section].len() {
                let mut cut = sections.clone();
                cut[section].truncate(length);
                assert!(
                    case.decode(&cut[0], &cut[1], &cut[2]).is_err(),
                    "{}: section {section} cut to {length}",
                    case.name
                );
            }
        }
    }
}

/// Bytes that pass the check because they were made to: decoders must still neither panic nor overrun.
#[test]
fn payloads_that_pass_the_check_but_lie_do_not_panic() {
    println!("seed 23");
    let mut rng = fastrand::Rng::with_seed(23);
    for case in cases() {
        for _ in 0..3000 {
            let mut damaged = case.encoded.clone();
            for _ in 0..rng.usize(1..4) {
                let in_head = rng.usize(..8) == 0;
                let bytes = if in_head { &mut damaged.head } else { &mut damaged.blob };
                let at = rng.usize(..bytes.len());
                bytes[at] = if rng.bool() { rng.u8(..) } else { bytes[at] ^ (1 << rng.u8(..8)) };
            }
            let mut out = vec![0; case.new.len()];
            let _ = decode_unchecked(case.spec, case.source(), &damaged.head, &damaged.blob, &mut out);
        }
    }
}

#[test]
fn a_spec_that_was_not_encoded_with_is_refused() {
    for case in cases() {
        let index = case.encoded.index_bytes();
        let other = [
            SegmentSpec {
                dtype: if case.spec.dtype == Dtype::Bf16 { Dtype::F16 } else { Dtype::I8 },
                ..case.spec
            },
            SegmentSpec { words: case.spec.words - 1, ..case.spec },
            SegmentSpec { words: usize::MAX, ..case.spec },
        ];
        for spec in other {
            let (mut heads, mut records, mut blob) =
                (&case.encoded.head[..], &index[..], &case.encoded.blob[..]);
            let Ok(view) = SegmentView::take(spec, &mut heads, &mut records, &mut blob) else { continue };
            assert!((0..view.chunks()).any(|chunk| view.check_chunk(chunk).is_err()), "{}", case.name);
        }
    }
}
