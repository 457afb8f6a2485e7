//! Damaged heads, records and blobs behind the payload check: an error or the exact words, nothing else.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use overspill_codec::{ChunkMode, SegmentView};
use overspill_fuzz::{Case, cases, damage};

static CASES: LazyLock<Vec<Case>> =
    LazyLock::new(|| ChunkMode::ALL[2..].iter().flat_map(|&mode| cases(mode)).collect());

fuzz_target!(|input: &[u8]| {
    let [pick, how, rest @ ..] = input else { return };
    let case = &CASES[usize::from(*pick) % CASES.len()];
    let (mut head, mut index, mut blob) =
        (case.encoded.head.clone(), case.index.clone(), case.encoded.blob.clone());
    match how % 3 {
        0 => damage(rest, &mut [&mut head, &mut index, &mut blob]),
        1 => {
            let cut = usize::from(*how) % (rest.len() + 1);
            [head, index] = [rest[..cut].to_vec(), rest[cut..].to_vec()];
        }
        _ => {
            let sections = [&mut head, &mut index, &mut blob];
            let picked = sections.into_iter().nth(usize::from(*how / 3) % 3).expect("one of three");
            picked.truncate(rest.len());
        }
    }
    let (mut heads, mut records, mut payloads) = (&head[..], &index[..], &blob[..]);
    let Ok(view) = SegmentView::take(case.spec, &mut heads, &mut records, &mut payloads) else { return };
    if !(heads.is_empty() && records.is_empty() && payloads.is_empty()) {
        return;
    }
    let mut out = vec![0; case.new.len()];
    if view.decode(case.source(), &mut out).is_ok() {
        assert!(out == case.new, "wrong words from damaged bytes");
    }
});
