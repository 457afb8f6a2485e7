//! `overspill doctor` from outside: it ends well on any machine, and says why where something could not be measured.

use std::path::Path;
use std::process::Command;

fn report(spill_dir: &Path) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_overspill"))
        .args(["doctor", "--json", "--spill-dir"])
        .arg(spill_dir)
        .output()
        .expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn link_and_disk_are_measured_with_or_without_a_gpu() {
    let folder = tempfile::tempdir().expect("folder");
    let report = report(folder.path());
    for (part, figure) in [("link", "offload_gbps"), ("link", "onboard_gbps"), ("disk", "write_gbps")] {
        assert!(report[part][figure].as_f64().is_some_and(|gbps| gbps > 0.0), "{part}.{figure}: {report}");
    }
    assert!(report["disk"]["direct_io"].is_boolean());
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0, "what was written is removed");
}

#[test]
fn a_spill_folder_that_cannot_be_used_is_named_in_the_advice() {
    let report = report(Path::new("/nonexistent/spill"));
    assert!(report["disk"]["absent"].is_string(), "{report}");
    let advice: Vec<_> =
        report["advice"].as_array().expect("a list").iter().map(ToString::to_string).collect();
    assert!(advice.iter().any(|line| line.contains("--spill-dir")), "{advice:?}");
}
