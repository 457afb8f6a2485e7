//! Any words, any base, any options: what is decoded is what was encoded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use overspill_codec::{
    Base, CodecChoice, Dtype, EncodeOptions, PatchKind, QuantLayout, SegmentSpec, SegmentView, encode_segment,
};

fuzz_target!(|input: &[u8]| {
    let [dtype, options, row, first, bytes @ ..] = input else { return };
    let dtype = Dtype::from_code(dtype % 22).expect("22 dtypes");
    let options = EncodeOptions {
        kind: if options & 1 == 0 { PatchKind::Relative } else { PatchKind::Absolute },
        codec: [CodecChoice::Auto, CodecChoice::Gpu, CodecChoice::EliasZstd, CodecChoice::Auto][usize::from(options >> 1 & 3)],
        row_words: u64::from(*row),
        first_word: u64::from(*first),
        ..EncodeOptions::default()
    };
    // Half of the input is the base, the other half is added to it, so that equal words are common.
    let words = bytes.len() / 2 / dtype.word_bytes();
    let (old, change) = bytes.split_at(words * dtype.word_bytes());
    let new: Vec<u8> = old.iter().zip(change).map(|(a, b)| a.wrapping_add(*b)).collect();
    let quantized = matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) && words % 32 == 0;
    let blocks = old.get(..words / 32 * 18).unwrap_or_default();
    let sources = [Base::None, Base::Words(old), Base::Quantized(QuantLayout::Q4_0, blocks)];
    for source in &sources[..if quantized { 3 } else { 2 }] {
        let encoded = encode_segment(*source, &new, dtype, &options).expect("valid input");
        let spec = SegmentSpec {
            dtype,
            words,
            row_words: options.row_words,
            first_word: options.first_word,
            base: source.kind(),
            kind: options.kind,
        };
        let records = encoded.index_bytes();
        let (mut heads, mut index, mut blob) = (&encoded.head[..], &records[..], &encoded.blob[..]);
        let view = SegmentView::take(spec, &mut heads, &mut index, &mut blob).expect("what was encoded");
        let mut out = vec![0; new.len()];
        view.decode(*source, &mut out).expect("what was encoded");
        assert!(out == new);
    }
});
