//! The program from outside: exit codes, one-line errors, JSON, and bounded memory.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn overspill(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_overspill"))
        .arg("tpde")
        .args(args)
        .current_dir(folder)
        .output()
        .expect("runs")
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

/// The one line on standard error.
fn line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "not one line: {text}");
    text
}

fn json(output: &Output) -> serde_json::Value {
    assert_eq!(code(output), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A safetensors file of one bf16 tensor.
fn write(path: &Path, words: &[u16]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let header =
        format!(r#"{{"w":{{"dtype":"BF16","shape":[{}],"data_offsets":[0,{}]}}}}"#, words.len(), bytes.len());
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length, header.as_bytes(), &bytes].concat()).expect("written");
}

fn words(seed: u64) -> Vec<u16> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..5000).map(|_| 0x3c00 + rng.u16(0..512)).collect()
}

fn folder_with_patch() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let base = words(1);
    let last: Vec<u16> = base.iter().enumerate().map(|(i, &w)| if i % 50 == 0 { w + 1 } else { w }).collect();
    write(&folder.path().join("a.safetensors"), &base);
    write(&folder.path().join("b.safetensors"), &last);
    let args = ["pack", "--base", "a.safetensors", "--final", "b.safetensors", "-o", "p.tpde"];
    let packed = overspill(folder.path(), &args);
    assert_eq!(code(&packed), Some(0), "{}", String::from_utf8_lossy(&packed.stderr));
    folder
}

#[test]
fn pack_apply_verify_inspect_diff() {
    let folder = folder_with_patch();
    let at = folder.path();
    let applied =
        overspill(at, &["apply", "--base", "a.safetensors", "--patch", "p.tpde", "-o", "c.safetensors"]);
    assert_eq!(code(&applied), Some(0));
    let [b, c] = ["b", "c"].map(|name| fs::read(at.join(format!("{name}.safetensors"))).expect("reads"));
    assert!(c.ends_with(&b[b.len() - 10_000..]), "the tensor's bytes");
    assert_eq!(json(&overspill(at, &["verify", "p.tpde", "--json"]))["decoded"], false);
    assert_eq!(
        json(&overspill(at, &["verify", "p.tpde", "--base", "a.safetensors", "--json"]))["decoded"],
        true
    );
    let report = json(&overspill(at, &["inspect", "p.tpde", "--json"]));
    assert_eq!(report["tensors"][0]["changed_share"], 0.02);
    assert_eq!(report["packed_bytes"], fs::metadata(at.join("p.tpde")).expect("a file").len());
    assert!(String::from_utf8_lossy(&overspill(at, &["inspect", "p.tpde"]).stdout).contains("2.000%"));
    let diff = json(&overspill(at, &["diff", "a.safetensors", "b.safetensors", "--json"]));
    assert_eq!(diff["tensors"][0]["ulps"][0], serde_json::json!({ "from": 1, "to": 1, "words": 100 }));
    for (report, fields) in [
        (&report, "base_id changed_share final_id kind packed_bytes ratio raw_bytes tensors"),
        (&report["tensors"][0], "base changed_share dtype modes name packed_bytes ratio raw_bytes shape"),
        (&report["tensors"][0]["modes"]["S"], "bytes chunks"),
        (&diff, "tensors unchanged"),
        (&diff["tensors"][0], "change changed name reshaped ulps words"),
    ] {
        let found: Vec<&str> = report.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(found.join(" "), fields, "as docs/tpde.md has it");
    }
    let absolute =
        ["pack", "--absolute", "--base", "a.safetensors", "--final", "b.safetensors", "-o", "abs.tpde", "-q"];
    assert!(overspill(at, &absolute).stdout.is_empty());
    let again = ["apply", "--base", "b.safetensors", "--patch", "abs.tpde", "-o", "d.safetensors"];
    assert_eq!(code(&overspill(at, &again)), Some(0), "an absolute patch applies twice");
}

#[test]
fn misuse_is_two_and_bad_data_is_one() {
    let folder = folder_with_patch();
    let at = folder.path();
    for args in [
        &["pack"][..],
        &["pack", "--final", "b.safetensors", "-o", "x", "--absolute"],
        &["apply", "--patch", "p.tpde", "-o", "x"],
        &["inspect", "p.tpde", "--memory-budget", "lots"],
        &["nonsense"],
    ] {
        assert_eq!(code(&overspill(at, args)), Some(2), "{args:?}");
    }
    let apply = ["apply", "--base", "b.safetensors", "--patch", "p.tpde", "-o", "x"];
    let wrong = overspill(at, &apply);
    assert_eq!(code(&wrong), Some(1));
    assert!(line(&wrong).contains("b.safetensors: wrong base"), "{}", line(&wrong));
    assert!(!at.join("x").exists());
    let mut damaged = fs::read(at.join("p.tpde")).expect("reads");
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    fs::write(at.join("damaged.tpde"), &damaged).expect("written");
    assert_eq!(code(&overspill(at, &["verify", "damaged.tpde"])), Some(1));
    let mut header = fs::read(at.join("a.safetensors")).expect("reads");
    header.truncate(header.len() - 1);
    fs::write(at.join("short.safetensors"), &header).expect("written");
    for missing in ["short.safetensors", "none.safetensors"] {
        let found = overspill(at, &["pack", "--final", missing, "-o", "x"]);
        assert_eq!(code(&found), Some(1));
        assert!(line(&found).contains(missing), "{}", line(&found));
    }
    fs::write(at.join("text"), "not a safetensors file, but long enough for a header").expect("written");
    fs::write(at.join("short"), "short").expect("written");
    for text in ["text", "short"] {
        let found = line(&overspill(at, &["pack", "--final", text, "-o", "x"]));
        assert!(found.contains(text) && found.contains("safetensors file"), "{found}");
    }
    let found = line(&overspill(at, &["pack", "--final", "b.safetensors", "-o", "nowhere/x"]));
    assert!(found.contains("nowhere/x: cannot create a file beside") && !found.contains(".part"), "{found}");
    assert_eq!(code(&overspill(at, &["--help"])), Some(0));
}

/// A base and a final of 768 MiB each pass through an address space of 384 MiB.
#[test]
fn memory_is_bounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tensors, tensor_bytes) = (3u64, 256u64 << 20);
    let entries: Vec<String> = (0..tensors)
        .map(|i| {
            let (words, start) = (tensor_bytes / 2, i * tensor_bytes);
            format!(
                r#""w{i}":{{"dtype":"BF16","shape":[{words}],"data_offsets":[{start},{}]}}"#,
                start + tensor_bytes
            )
        })
        .collect();
    let mut header = format!("{{{}}}", entries.join(","));
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    for name in ["a", "b"] {
        let start = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        let path = folder.path().join(name);
        fs::write(&path, &start).expect("written");
        // Sparse: the zeros are never on disk, but they are read like any others.
        let file = fs::File::options().write(true).open(&path).expect("opens");
        file.set_len(start.len() as u64 + tensors * tensor_bytes).expect("sized");
        if name == "b" {
            std::os::unix::fs::FileExt::write_all_at(&file, &[1, 0, 1], 300_000_000).expect("written");
        }
    }
    let program = env!("CARGO_BIN_EXE_overspill");
    let capped = |args: &str| {
        let script = format!("ulimit -v {}; exec {program} tpde -q --memory-budget 192MiB {args}", 384 << 10);
        let output =
            Command::new("sh").args(["-c", &script]).current_dir(folder.path()).output().expect("runs");
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    };
    capped("pack --base a --final b -o p");
    capped("apply --base a --patch p -o c");
    let same = Command::new("cmp").args(["b", "c"]).current_dir(folder.path()).status().expect("runs");
    assert!(same.success(), "the rebuilt file differs");
}
