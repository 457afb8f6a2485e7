//! An operation that is told to end: alone in its file, because [`overspill_tpde::stop`] is for the whole process.

mod common;

use common::{checkpoint, pair, quiet};
use overspill_tpde::{Error, Options, PackOptions, Patch, apply, pack, stop};

#[test]
fn a_stopped_operation_leaves_no_output() {
    let (base, last) = pair(1, 2048);
    let (base, last) = (checkpoint(&base), checkpoint(&last));
    let folder = tempfile::tempdir().expect("a folder");
    let [patch, target] = ["patch.tpde", "final.safetensors"].map(|name| folder.path().join(name));
    let run = Options { threads: 1, ..Options::default() };
    let options = PackOptions { run, ..PackOptions::default() };
    pack(Some(&base), &last, &patch, &options, &quiet).expect("packs");
    // One thread: what it reports first is not the last segment.
    let stop_at_once = |done, total| {
        assert!(done < total, "stopped after the end");
        stop();
    };
    let opened = Patch::open(&patch).expect("opens");
    let applied = apply(&opened, Some(&base), &target, &run, &stop_at_once);
    assert!(matches!(applied, Err(Error::Stopped)), "{applied:?}");
    let packed = pack(Some(&base), &last, &target, &options, &quiet);
    assert!(matches!(packed, Err(Error::Stopped)), "{packed:?}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 1, "more than the patch");
}
