//! Files in and out: single, sharded, streamed in small memory; nothing is left behind by a failure.

mod common;

use std::fs;
use std::path::Path;

use common::{State, applied, checkpoint, owned, packed, pair, quiet, weights};
use overspill_tpde::{
    Checkpoint, Dtype, Error, Options, PackOptions, Patch, apply, apply_two, diff, pack, state_id,
};

/// Writes a state as safetensors by packing it alone and applying that.
fn write(state: &State, path: &Path) {
    let patch = packed(None, state, &PackOptions::default());
    let patch = Patch::from_bytes("patch", &patch).expect("opens");
    apply(&patch, None, path, &Options::default(), &quiet).expect("applies");
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("lists")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn memory_round_trip_of_every_kind() {
    let (base, last) = pair(1, 4096);
    for absolute in [false, true] {
        let options = PackOptions { absolute, ..PackOptions::default() };
        let patch = packed(Some(&base), &last, &options);
        assert_eq!(applied(&patch, Some(&base)).expect("applies"), last);
    }
    let patch = packed(None, &last, &PackOptions::default());
    assert_eq!(applied(&patch, None).expect("applies"), last);
}

#[test]
fn payloads_are_read_in_pieces_to_where_the_caller_wants_them() {
    let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(10 << 20).collect();
    let state = vec![owned("noise", Dtype::U8, &[bytes.len() as u64], bytes)];
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("p");
    pack(None, &checkpoint(&state), &path, &PackOptions::default(), &quiet).expect("packs");
    let patch = Patch::open(&path).expect("opens");
    let (start, length) = (3, patch.blob_bytes() as usize - 5);
    assert!(length > 2 * (4 << 20), "one piece shows nothing");
    let (mut read, mut scratch) = (vec![0; length], Vec::new());
    patch.read_blob(start, &mut read).expect("reads");
    assert!(read == patch.blob(start, length, &mut scratch).expect("reads"));
    assert!(patch.read_blob(patch.blob_bytes(), &mut vec![0; 64 << 20]).is_err());
}

#[test]
fn a_wrong_base_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let (base, last) = pair(2, 4096);
    let [a, b, p] = ["a", "b", "p"].map(|name| folder.path().join(name));
    write(&base, &a);
    write(&last, &b);
    let [base, last] = [&a, &b].map(|path| Checkpoint::open(path).expect("opens"));
    pack(Some(&base), &last, &p, &PackOptions::default(), &quiet).expect("packs");
    let mut wrong = pair(2, 4096).0;
    wrong[0].bytes[17] ^= 1;
    let patch = Patch::open(&p).expect("opens");
    let before = names(folder.path());
    let target = folder.path().join("out");
    let error = apply(&patch, Some(&checkpoint(&wrong)), &target, &Options::default(), &quiet);
    assert!(matches!(error, Err(Error::WrongBase { .. })), "{error:?}");
    assert!(apply(&patch, Some(&last), &target, &Options::default(), &quiet).is_err());
    assert!(matches!(apply(&patch, None, &target, &Options::default(), &quiet), Err(Error::Misuse { .. })));
    assert_eq!(names(folder.path()), before);
    apply(&patch, Some(&base), &target, &Options::default(), &quiet).expect("the right base");
    assert_eq!(fs::read(&target).expect("reads"), fs::read(&b).expect("reads"));
}

#[test]
fn a_damaged_patch_leaves_the_old_output_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_, last) = pair(3, 4096);
    let [p, target] = ["p", "out"].map(|name| folder.path().join(name));
    let mut patch = packed(None, &last, &PackOptions::default());
    let middle = patch.len() / 2;
    patch[middle] ^= 4;
    fs::write(&p, patch).expect("written");
    fs::write(&target, b"precious").expect("written");
    let found = Patch::open(&p).and_then(|p| apply(&p, None, &target, &Options::default(), &quiet));
    assert!(found.is_err());
    assert_eq!(fs::read(&target).expect("reads"), b"precious");
    assert_eq!(names(folder.path()), ["out", "p"]);
}

#[test]
fn sharded_in_and_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let (base, last) = pair(5, 4096);
    let shards = folder.path().join("sharded");
    fs::create_dir(&shards).expect("made");
    let mut map = serde_json::Map::new();
    for (i, half) in [&last[..3], &last[3..]].iter().enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        write(&half.to_vec(), &shards.join(&name));
        map.extend(half.iter().map(|t| (t.name.clone(), name.clone().into())));
    }
    let index = serde_json::json!({ "metadata": { "total_size": 7 }, "weight_map": map });
    let index_text = format!("{}\n", serde_json::to_string_pretty(&index).expect("JSON"));
    fs::write(shards.join("model.safetensors.index.json"), index_text).expect("written");
    let (p, target) = (folder.path().join("p"), folder.path().join("out"));
    let sharded = Checkpoint::open(&shards).expect("opens");
    let id = state_id(&sharded, &Options::default(), &quiet).expect("hashes");
    assert_eq!(id, state_id(&checkpoint(&last), &Options::default(), &quiet).expect("hashes"));
    pack(Some(&checkpoint(&base)), &sharded, &p, &PackOptions::default(), &quiet).expect("packs");
    let patch = Patch::open(&p).expect("opens");
    apply(&patch, Some(&checkpoint(&base)), &target, &Options::default(), &quiet).expect("applies");
    assert_eq!(names(&target), names(&shards));
    for name in names(&shards) {
        assert_eq!(fs::read(target.join(&name)).ok(), fs::read(shards.join(&name)).ok(), "{name}");
    }
    let again = apply(&patch, Some(&checkpoint(&base)), &target, &Options::default(), &quiet);
    assert!(matches!(again, Err(Error::Misuse { .. })), "an existing folder is not replaced");
    fs::remove_file(shards.join("model-00002-of-00002.safetensors")).expect("removed");
    assert!(Checkpoint::open(&shards).is_err(), "a missing shard");
}

/// A blob past the flush limit goes to the file as it grows; blob and index start on pages.
#[test]
fn a_large_patch_streams_and_is_aligned() {
    let folder = tempfile::tempdir().expect("a folder");
    println!("seed 6");
    let mut rng = fastrand::Rng::with_seed(6);
    let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(36 << 20).collect();
    let last = vec![
        owned("noise", Dtype::U8, &[36 << 20], noise),
        owned("w", Dtype::Bf16, &[512], weights(&mut rng, 512)),
    ];
    let p = folder.path().join("p.tpde");
    let options =
        PackOptions { run: Options { memory_bytes: 256 << 20, threads: 2 }, ..PackOptions::default() };
    pack(None, &checkpoint(&last), &p, &options, &quiet).expect("packs");
    let bytes = fs::read(&p).expect("reads");
    assert_eq!(applied_large(&bytes), last);
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    let header: serde_json::Value =
        serde_json::from_slice(&bytes[8..8 + header_bytes as usize]).expect("JSON");
    for section in ["blob", "index"] {
        let start = header[section]["data_offsets"][0].as_u64().expect("a number");
        assert_eq!((8 + header_bytes + start) % 4096, 0, "{section}");
    }
    let memory = packed(None, &last, &options);
    assert!(memory == bytes, "memory and file hold the same patch");
}

fn applied_large(bytes: &[u8]) -> State {
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("out");
    let patch = Patch::from_bytes("patch", bytes).expect("opens");
    apply(&patch, None, &target, &Options::default(), &quiet).expect("applies");
    let all = fs::read(&target).expect("reads");
    let header_bytes = u64::from_le_bytes(all[..8].try_into().expect("8 bytes")) as usize;
    let mut at = 8 + header_bytes;
    patch
        .manifest()
        .entries()
        .iter()
        .map(|entry| {
            let overspill_tpde::Kind::Plain(dtype) = entry.tensor.kind else {
                unreachable!("finals are plain")
            };
            let bytes = all[at..at + entry.tensor.bytes as usize].to_vec();
            at += bytes.len();
            owned(&entry.tensor.name, dtype, &entry.tensor.shape, bytes)
        })
        .collect()
}

#[test]
fn diff_counts_words_and_ulps() {
    let word = |value: f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
    let a = vec![owned("w", Dtype::Bf16, &[4], [word(1.0), word(-0.0), word(2.0), word(3.0)].concat())];
    let up = |value: f32, by: u16| ((value.to_bits() >> 16) as u16 + by).to_le_bytes();
    let b = vec![owned("w", Dtype::Bf16, &[4], [up(1.0, 1), word(0.0), up(2.0, 5), word(3.0)].concat())];
    let found =
        diff(&checkpoint(&a), &checkpoint(&b), &Options::default(), &quiet).expect("compares").to_json();
    let ulps = serde_json::json!([{ "from": 1, "to": 1, "words": 2 }, { "from": 4, "to": 7, "words": 1 }]);
    assert_eq!(found["tensors"][0]["ulps"], ulps, "{found}");
    assert_eq!(found["tensors"][0]["changed"], 3);
}

/// The slow twin of two patches in one pass is one after the other.
#[test]
fn two_patches_in_one_pass_make_what_one_after_the_other_makes() {
    let folder = tempfile::tempdir().expect("a folder");
    let (base, middle) = pair(7, 4096);
    println!("seed 8");
    let mut rng = fastrand::Rng::with_seed(8);
    let mut last = middle.clone();
    for tensor in last.iter_mut().filter(|tensor| tensor.dtype == Dtype::Bf16) {
        tensor.bytes = common::nudged(&mut rng, &tensor.bytes, 0.1);
    }
    last.push(owned("new", Dtype::Bf16, &[64], weights(&mut rng, 64)));
    let [a, once, twice, fused] = ["a", "once", "twice", "fused"].map(|name| folder.path().join(name));
    write(&base, &a);
    let [first, second] =
        [(&base, &middle), (&middle, &last)].map(|(x, y)| packed(Some(x), y, &PackOptions::default()));
    let [first, second] = [&first, &second].map(|patch| Patch::from_bytes("patch", patch).expect("opens"));
    let on_disk = Checkpoint::open(&a).expect("opens");
    let options = Options::default();
    apply(&first, Some(&on_disk), &once, &options, &quiet).expect("applies");
    let between = Checkpoint::open(&once).expect("opens");
    apply(&second, Some(&between), &twice, &options, &quiet).expect("applies");
    for base in [&on_disk, &checkpoint(&base)] {
        let made = apply_two(&first, &second, base, &fused, &options, &quiet).expect("applies");
        assert_eq!(made, second.final_id());
        assert_eq!(fs::read(&fused).expect("reads"), fs::read(&twice).expect("reads"));
        fs::remove_file(&fused).expect("removed");
    }
    // Another base, and patches the wrong way round: refused, and nothing is left.
    let mut wrong = base.clone();
    wrong[0].bytes[9] ^= 0x40;
    let before = names(folder.path());
    assert!(apply_two(&first, &second, &checkpoint(&wrong), &fused, &options, &quiet).is_err());
    let turned = apply_two(&second, &first, &on_disk, &fused, &options, &quiet);
    assert!(matches!(turned, Err(Error::Misuse { .. })), "{turned:?}");
    assert_eq!(names(folder.path()), before);
}
