//! Golden files of every container version: whole patches that make the state they were made from, for ever.
//!
//! Beside each version's patches lie its base and final as safetensors. `OVERSPILL_WRITE_GOLDENS=1 cargo test -p
//! overspill-tpde --test golden` writes those of the present version; files of released versions are never written
//! again.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{checkpoint, packed, pair, quiet};
use overspill_tpde::{
    Checkpoint, CodecChoice, Options, PackOptions, Patch, PatchType, apply, flatten, state_id, verify,
};

const VERSIONS: [&str; 1] = ["v1"];
const SEED: u64 = 42;

fn golden(version: &str, name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{version}-{name}"))
}

/// Patches of one version: name, and whether it needs the base.
const PATCHES: [(&str, bool); 4] =
    [("standalone.tpde", false), ("relative.tpde", true), ("absolute.tpde", true), ("elias-zstd.tpde", true)];

fn write(version: &str) {
    let (base, last) = pair(SEED, 2048);
    fs::create_dir_all(golden(version, "").parent().expect("a folder")).expect("made");
    for (name, state) in [("base.safetensors", &base), ("final.safetensors", &last)] {
        flatten(&checkpoint(state), &golden(version, name), &Options::default(), &quiet).expect("written");
    }
    for (name, needs_base) in PATCHES {
        let absolute = name.starts_with("absolute");
        let codec = if name.starts_with("elias") { CodecChoice::EliasZstd } else { CodecChoice::Auto };
        let options = PackOptions { absolute, codec, ..PackOptions::default() };
        let patch = packed(needs_base.then_some(&base), &last, &options);
        fs::write(golden(version, name), patch).expect("written");
    }
}

#[test]
fn patches_of_every_version_make_their_state() {
    if std::env::var_os("OVERSPILL_WRITE_GOLDENS").is_some() {
        write(VERSIONS[VERSIONS.len() - 1]);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("made.safetensors");
    for version in VERSIONS {
        let base = Checkpoint::open(&golden(version, "base.safetensors")).expect("the base");
        let last = Checkpoint::open(&golden(version, "final.safetensors")).expect("the final");
        let expected = state_id(&last, &Options::default(), &quiet).expect("its id");
        for (name, needs_base) in PATCHES {
            let patch = Patch::open(&golden(version, name)).expect("opens");
            assert_eq!(patch.kind() == PatchType::Standalone, !needs_base, "{version} {name}");
            assert_eq!(patch.final_id(), expected, "{version} {name}: ids of states stay as they are");
            let base = needs_base.then_some(&base);
            assert!(verify(&patch, base, &Options::default(), &quiet).expect("sound").decoded);
            apply(&patch, base, &target, &Options::default(), &quiet).expect("applies");
            let made = Checkpoint::open(&target).expect("the result");
            // Offsets differ with the order of tensors in the file; names, types, shapes and bytes may not.
            let found = overspill_tpde::diff(&made, &last, &Options::default(), &quiet).expect("compared");
            assert!(found.tensors.is_empty(), "{version} {name}");
        }
    }
}
