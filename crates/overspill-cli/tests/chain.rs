//! `overspill chain` from outside.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn chain(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_overspill"))
        .arg("chain")
        .args(args)
        .current_dir(folder)
        .output()
        .expect("runs")
}

fn json(output: &Output) -> serde_json::Value {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A safetensors file of one bf16 tensor, of which `step` changes a few words.
fn write(path: &Path, step: u16) {
    let words = (0..20_000u16).map(|i| if i % 97 == step { 0x3f81u16 } else { 0x3f80 });
    let bytes: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":[20000],"data_offsets":[0,{}]}}}}"#, bytes.len());
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes].concat())
        .expect("written");
}

#[test]
fn steps_are_committed_listed_restored_checked_and_dropped() {
    let folder = tempfile::tempdir().expect("folder");
    json(&chain(folder.path(), &["init", "run", "--json"]));
    for step in 0..4 {
        write(&folder.path().join("state.safetensors"), step);
        let step = (u64::from(step) * 5).to_string();
        json(&chain(folder.path(), &["commit", "run", "--step", &step, "state.safetensors", "--json"]));
    }
    let log = json(&chain(folder.path(), &["log", "run", "--json"]));
    assert_eq!(log.as_array().map(Vec::len), Some(4));
    assert_eq!(log[0]["parts"]["params"]["role"], "keyframe");
    assert!(log[3]["parts"]["params"]["new_bytes"].as_u64().is_some_and(|bytes| bytes < 4000), "{log}");
    let table = chain(folder.path(), &["log", "run"]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("total"));

    json(&chain(folder.path(), &["restore", "run", "--step", "10", "-o", "back.safetensors", "--json"]));
    write(&folder.path().join("expected.safetensors"), 2);
    let back = fs::read(folder.path().join("back.safetensors")).expect("read");
    let expected = fs::read(folder.path().join("expected.safetensors")).expect("read");
    assert_eq!(back[back.len() - 40_000..], expected[expected.len() - 40_000..]);

    assert_eq!(json(&chain(folder.path(), &["verify", "run", "--decode", "--json"]))["steps"], 4);
    let dropped = json(&chain(folder.path(), &["gc", "run", "--last", "1", "--json"]));
    assert_eq!(dropped["steps"], serde_json::json!([0, 5, 10]));
    assert_eq!(json(&chain(folder.path(), &["verify", "run", "--decode", "--json"]))["steps"], 1);
}

#[test]
fn misuse_and_damage_have_their_codes_and_one_line() {
    let folder = tempfile::tempdir().expect("folder");
    write(&folder.path().join("state.safetensors"), 0);
    json(&chain(folder.path(), &["init", "run", "--json"]));
    json(&chain(folder.path(), &["commit", "run", "--step", "1", "state.safetensors", "--json"]));
    for (args, code, part) in [
        (&["log", "nowhere"][..], 2, "chain init"),
        (&["init", "run"], 2, "already"),
        (&["restore", "run", "--step", "7", "-o", "x"], 2, "step 7"),
        (&["restore", "run", "--part", "moments", "-o", "x"], 2, "params"),
        (&["commit", "run", "--step", "0", "state.safetensors"], 2, "after step 1"),
        (&["commit", "run", "--step", "2", "missing.safetensors"], 1, "missing.safetensors"),
    ] {
        let output = chain(folder.path(), args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.lines().count() == 1 && text.contains(part), "{args:?}: {text}");
    }
    let objects = fs::read_dir(folder.path().join("run/objects")).expect("listed");
    for entry in objects.flatten() {
        fs::write(entry.path(), "not it").expect("written");
    }
    assert_eq!(chain(folder.path(), &["verify", "run"]).status.code(), Some(1));
    assert_eq!(chain(folder.path(), &["restore", "run", "-o", "x"]).status.code(), Some(1));
    assert!(!folder.path().join("x").exists());
}
