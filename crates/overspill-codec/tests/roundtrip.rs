//! Every dtype, random segments: what comes out is what went in, bit for bit.

use overspill_codec::*;
use proptest::prelude::*;

fn roundtrip(base: Option<&[u8]>, new: &[u8], dtype: Dtype, options: EncodeOptions) {
    let source = base.map_or(Base::None, Base::Words);
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
    let mut words = base.map_or_else(|| vec![0x5a; new.len()], <[u8]>::to_vec);
    view.apply(&mut words).expect("apply");
    assert!(words == new, "{} in place", dtype.name());
    if options.kind == PatchKind::Absolute {
        view.apply(&mut words).expect("apply twice");
        assert!(words == new, "{} twice", dtype.name());
    }
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
            roundtrip(Some(&base), &new, dtype, options);
            roundtrip(None, &new, dtype, options);
        }
    }
}
