//! Patches put together from segments that someone else encoded and hashed: what packing makes, byte for byte.

mod common;

use common::{State, applied, checkpoint, pair, quiet};
use overspill_codec::{Base, EncodeOptions, EncodedSegment, encode_segment, segments};
use overspill_tpde::{
    BaseKind, BlobHasher, Checkpoint, CodecChoice, Coded, Error, Kind, LARGE_BLOB_START, Options,
    PackOptions, Parts, Patch, SegmentHash, StateId, authenticate, hash_segment, pack_to_pieces, state_id,
    state_id_of,
};

/// The state as a device has it: all but the bytes.
fn elsewhere(state: &State) -> Checkpoint<'static> {
    let tensors = state.iter().map(|t| (t.name.clone(), Kind::Plain(t.dtype), t.shape.clone()));
    Checkpoint::elsewhere("elsewhere", tensors.collect()).expect("a valid state")
}

/// Bytes of `words` words of tensor `number` from `first` on.
fn words(state: &State, number: usize, first: u64, words: usize) -> &[u8] {
    let tensor = &state[number];
    let start = first as usize * tensor.dtype.word_bytes();
    &tensor.bytes[start..start + words * tensor.dtype.word_bytes()]
}

fn id_of(state: &State) -> StateId {
    let there = elsewhere(state);
    let hashes = there.sorted().flat_map(|tensor| {
        let number = state.iter().position(|own| own.name == tensor.name).expect("it is there");
        segments(tensor.words()).map(move |(first, count)| hash_segment(words(state, number, first, count)))
    });
    state_id_of(&there, &hashes.collect::<Vec<SegmentHash>>())
}

fn encode(base: Option<&State>, last: &State, coded: &Coded) -> EncodedSegment {
    let spec = coded.spec;
    let old = match (base, coded.base, spec.base) {
        (Some(base), Some(number), BaseKind::Words) => {
            Base::Words(words(base, number, spec.first_word, spec.words))
        }
        _ => Base::None,
    };
    let options = EncodeOptions {
        codec: CodecChoice::Gpu,
        row_words: spec.row_words,
        first_word: spec.first_word,
        ..EncodeOptions::default()
    };
    encode_segment(old, words(last, coded.tensor, spec.first_word, spec.words), spec.dtype, &options)
        .expect("encodes")
}

fn assembled(base: Option<&State>, last: &State) -> Vec<u8> {
    let (old, new) = (base.map(elsewhere), elsewhere(last));
    let plan = Parts::plan(old.as_ref(), &new).expect("plans");
    let encoded: Vec<EncodedSegment> = plan.iter().map(|coded| encode(base, last, coded)).collect();
    let (mut index, mut heads, mut blob) = (Vec::new(), Vec::new(), Vec::new());
    let mut changed = vec![0; last.len()];
    for (coded, segment) in plan.iter().zip(&encoded) {
        index.extend(segment.index_bytes());
        heads.extend_from_slice(&segment.head);
        blob.extend_from_slice(&segment.blob);
        changed[coded.tensor] += segment.stats.changed;
    }
    let from = old.as_ref().zip(base.map(id_of));
    let parts =
        Parts::new(from, (&new, id_of(last)), &changed, index, heads, blob.len() as u64).expect("starts");
    let start = parts.blob_start();
    assert!(blob.len() < 1 << 20 || start == LARGE_BLOB_START);
    let mut hasher = BlobHasher::new();
    blob.chunks(3 << 10).for_each(|piece| hasher.add(piece));
    let ([front, behind], report) = parts.finish(hasher);
    assert_eq!(front.len(), start);
    let patch = [front, blob, behind].concat();
    assert_eq!(patch.len() as u64, report.packed_bytes);
    patch
}

#[test]
fn parts_make_the_patch_that_packing_makes() {
    // The last is so large that its blob is aligned.
    for (seed, words) in [(1, 4096), (2, 64), (3, 9 << 20)] {
        let (base, last) = pair(seed, words);
        for base in [Some(&base), None] {
            let made = assembled(base, &last);
            let options = PackOptions { codec: CodecChoice::Gpu, ..PackOptions::default() };
            let from = base.map(checkpoint);
            let (_, pieces) =
                pack_to_pieces(from.as_ref(), &checkpoint(&last), &options, &quiet).expect("packs");
            let expected = pieces.concat();
            let [ours, theirs] =
                [&made, &expected].map(|patch| Patch::from_bytes("patch", patch).expect("opens"));
            authenticate(&ours, &Options::default()).expect("its own hash");
            assert_eq!((ours.kind(), ours.final_id()), (theirs.kind(), theirs.final_id()), "seed {seed}");
            assert_eq!(ours.manifest(), theirs.manifest());
            assert!(
                ours.index() == theirs.index() && ours.blob_bytes() == theirs.blob_bytes(),
                "seed {seed}"
            );
            let (mut one, mut other) = (Vec::new(), Vec::new());
            let bytes = ours.blob_bytes() as usize;
            assert!(
                ours.blob(0, bytes, &mut one).expect("reads")
                    == theirs.blob(0, bytes, &mut other).expect("reads")
            );
            assert!(words > 1 << 20 || applied(&made, base).expect("applies") == last, "seed {seed}");
        }
    }
}

#[test]
fn a_state_elsewhere_has_the_same_id_and_no_bytes() {
    let (base, _) = pair(4, 4096);
    assert_eq!(id_of(&base), state_id(&checkpoint(&base), &Options::default(), &quiet).expect("hashes"));
    let read = state_id(&elsewhere(&base), &Options::default(), &quiet);
    assert!(matches!(read, Err(Error::Format { .. })), "{read:?}");
    let twice = vec![("a".to_owned(), Kind::Plain(overspill_tpde::Dtype::U8), vec![3]); 2];
    assert!(Checkpoint::elsewhere("twice", twice).is_err());
}
