//! Outputs under faults: a full disk, a short write, a program that dies. The old target stays until the new one is
//! whole.
//!
//! A limit on file sizes stands in for the disk: where its signal is ignored, a write is cut short and the next one
//! fails, as on a full disk; where it is not, the system kills the program in the middle of the write.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_overspill");
const OLD: &[u8] = b"what stood here before";

/// A safetensors file of one tensor that does not compress.
fn write_noise(path: &Path, bytes: usize, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut header = format!(r#"{{"w":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(bytes).collect();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &noise].concat())
        .expect("written");
}

/// Runs `overspill tpde ARGS` where no file may grow beyond `blocks` of 512 bytes.
fn limited(folder: &Path, blocks: usize, ignore_signal: bool, args: &str) -> Output {
    let trap = if ignore_signal { "trap '' XFSZ; " } else { "" };
    let script = format!("{trap}ulimit -c 0; ulimit -f {blocks}; exec {PROGRAM} tpde -q {args}");
    Command::new("sh").args(["-c", &script]).current_dir(folder).output().expect("runs")
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("lists");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Folder with `b` (200,000 bytes), its patch `p` (larger than most limits below) and an old `out`.
fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write_noise(&folder.path().join("b"), 200_000, 1);
    let packed = limited(folder.path(), 1 << 20, false, "pack --final b -o p");
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    fs::write(folder.path().join("out"), OLD).expect("written");
    folder
}

#[test]
fn a_full_disk_is_an_error_and_leaves_the_old_target() {
    let folder = prepared();
    for args in ["pack --final b -o out", "apply --patch p -o out"] {
        for blocks in [0, 1, 8, 100, 380] {
            let output = limited(folder.path(), blocks, true, args);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{args}, {blocks} blocks: {text}");
            assert!(text.lines().count() == 1 && text.contains("out"), "{args}, {blocks} blocks: {text}");
            assert_eq!(fs::read(folder.path().join("out")).expect("reads"), OLD, "{args}, {blocks} blocks");
            assert_eq!(names(folder.path()), ["b", "out", "p"], "{args}, {blocks} blocks");
        }
    }
}

#[test]
fn a_program_killed_in_a_write_leaves_the_old_target() {
    let folder = prepared();
    for args in ["pack --final b -o out", "apply --patch p -o out"] {
        for blocks in [0, 8, 100, 380] {
            let output = limited(folder.path(), blocks, false, args);
            assert!(output.status.signal().is_some(), "{args}, {blocks} blocks: {:?}", output.status);
            assert_eq!(fs::read(folder.path().join("out")).expect("reads"), OLD, "{args}, {blocks} blocks");
        }
    }
}

/// A folder with a checkpoint that takes a while, packed as `p`; the checkpoint's bytes.
fn large(seed: u64) -> (tempfile::TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().expect("a folder");
    let checkpoint = folder.path().join("b");
    write_noise(&checkpoint, 24 << 20, seed);
    let packed = limited(folder.path(), 1 << 20, false, "pack --final b -o p");
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    let whole = fs::read(&checkpoint).expect("reads");
    (folder, whole)
}

/// Killed at any moment, the target is the old file or the new one, whole.
#[test]
fn a_killed_program_never_leaves_half_a_file() {
    let (folder, whole) = large(2);
    let [p, out] = ["p", "out"].map(|name| folder.path().join(name));
    for round in 0..12 {
        fs::write(&out, OLD).expect("written");
        let mut child = Command::new(PROGRAM)
            .args(["tpde", "-q", "apply", "--patch"])
            .args([&p, Path::new("-o"), &out])
            .spawn()
            .expect("runs");
        std::thread::sleep(Duration::from_millis(4 * round));
        child.kill().expect("killed, or done already");
        child.wait().expect("ends");
        let found = fs::read(&out).expect("reads");
        assert!(found == OLD || found == whole, "round {round}: {} bytes", found.len());
    }
}

/// Told to end at any moment, the program leaves the old file or the new one, and nothing beside it.
#[test]
fn a_stopped_program_leaves_nothing_behind() {
    let (folder, whole) = large(3);
    let out = folder.path().join("out");
    for round in 0..12 {
        fs::write(&out, OLD).expect("written");
        let child = Command::new(PROGRAM)
            .args(["tpde", "-q", "apply", "--patch", "p", "-o", "out"])
            .current_dir(folder.path())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("runs");
        std::thread::sleep(Duration::from_millis(4 * round));
        let signal = ["-INT", "-TERM", "-HUP"][round as usize % 3];
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
        let output = child.wait_with_output().expect("ends");
        let (found, text) = (fs::read(&out).expect("reads"), String::from_utf8_lossy(&output.stderr));
        assert_eq!(names(folder.path()), ["b", "out", "p"], "round {round}");
        match output.status.code() {
            Some(0) => assert!(found == whole, "round {round}"),
            // Before it could catch a signal it had not begun.
            None => assert!(found == OLD, "round {round}"),
            code => {
                assert_eq!(code, Some(1), "round {round}: {text}");
                assert!(found == OLD && text.lines().count() == 1 && text.contains("stopped"), "{text}");
            }
        }
    }
}
