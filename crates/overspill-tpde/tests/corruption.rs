//! A damaged patch is refused or makes exactly the packed state: never a panic, never another result.

mod common;

use common::{State, applied, packed, pair};
use overspill_tpde::{Checkpoint, PackOptions, Patch, verify};

const SEED: u64 = 4;

fn cases() -> Vec<(Vec<u8>, Option<State>, State)> {
    let (base, last) = pair(SEED, 512);
    let absolute = PackOptions { absolute: true, ..PackOptions::default() };
    vec![
        (packed(Some(&base), &last, &PackOptions::default()), Some(base.clone()), last.clone()),
        (packed(Some(&base), &last, &absolute), Some(base), last.clone()),
        (packed(None, &last, &PackOptions::default()), None, last),
    ]
}

#[test]
fn every_bit_flipped() {
    println!("seed {SEED}");
    for (patch, base, last) in cases() {
        for bit in 0..patch.len() * 8 {
            let mut damaged = patch.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if let Ok(made) = applied(&damaged, base.as_ref()) {
                assert_eq!(made, last, "bit {bit} made another state");
            }
            let Ok(opened) = Patch::from_bytes("patch", &damaged) else { continue };
            // Without the base only the patch's own bytes are at stake, and every one of them is authenticated.
            if base.is_some() {
                let found = verify(&opened, None, &Default::default(), &common::quiet);
                assert!(found.is_err(), "bit {bit} was not noticed");
            }
        }
    }
}

#[test]
fn every_truncation_and_extension() {
    for (patch, base, _) in cases() {
        for length in 0..patch.len() {
            assert!(applied(&patch[..length], base.as_ref()).is_err(), "cut to {length} bytes");
        }
        let longer = [patch.as_slice(), &[0]].concat();
        assert!(applied(&longer, base.as_ref()).is_err());
    }
}

#[test]
fn declared_sizes_are_not_believed() {
    let huge = 1u64 << 60;
    let file = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes
    };
    let mut long_header = huge.to_le_bytes().to_vec();
    long_header.extend_from_slice(b"{}");
    let tensor = |shape: &str, offsets: &str| {
        file(&format!(r#"{{"w":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}"#))
    };
    let cases = [
        long_header,
        tensor(&format!("[{huge}]"), &format!("[0,{huge}]")),
        tensor(&format!("[{huge},{huge}]"), "[0,0]"),
        tensor("[0]", &format!("[{huge},{huge}]")),
        tensor("[1]", "[1,0]"),
        file(r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#),
        file(
            r#"{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
        ),
    ];
    let folder = tempfile::tempdir().expect("a folder");
    for (i, bytes) in cases.iter().enumerate() {
        assert!(Patch::from_bytes("patch", bytes).is_err(), "case {i} as a patch");
        let path = folder.path().join("case.safetensors");
        std::fs::write(&path, bytes).expect("written");
        assert!(Checkpoint::open(&path).is_err(), "case {i} as a checkpoint");
    }
}

/// A manifest may declare 2^60 words with a valid hash: heads, one byte a segment at least, bound what is believed.
#[test]
fn declared_words_need_heads() {
    let (_, last) = pair(SEED, 512);
    let patch = packed(None, &last, &PackOptions::default());
    let text = String::from_utf8_lossy(&patch).into_owned();
    assert!(text.contains("manifest"));
    for shape in ["[1152921504606846976]", "[1073741824,1073741824]"] {
        let forged = forge_manifest(&patch, shape);
        let error = Patch::from_bytes("patch", &forged).expect_err("refused").to_string();
        assert!(error.contains("shape too large") || error.contains("ends early"), "{error}");
    }
}

/// The patch with its manifest's first non-empty shape replaced.
fn forge_manifest(patch: &[u8], shape: &str) -> Vec<u8> {
    let header_bytes = u64::from_le_bytes(patch[..8].try_into().expect("8 bytes")) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&patch[8..8 + header_bytes]).expect("JSON");
    let data = &patch[8 + header_bytes..];
    let start = header["manifest"]["data_offsets"][0].as_u64().expect("a number") as usize;
    let manifest = zstd::decode_all(&data[start..]).expect("a zstd frame");
    let manifest = String::from_utf8(manifest).expect("JSON").replacen("[64]", shape, 1);
    let section = zstd::encode_all(manifest.as_bytes(), 3).expect("compresses");
    header["manifest"]["shape"] = serde_json::json!([section.len()]);
    header["manifest"]["data_offsets"] = serde_json::json!([start, start + section.len()]);
    let text = header.to_string();
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data[..start], &section].concat()
}
