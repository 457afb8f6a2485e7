//! Every kernel compiles for every architecture, on a machine without a GPU.
//!
//! Where NVRTC is not found the tests are left out and say so; `OVERSPILL_REQUIRE_NVRTC=1` makes
//! that a failure.

use overspill_device::{
    Error, kernels,
    nvrtc::{Nvrtc, cache::KernelCache, table},
};

fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::find(None) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            let required = std::env::var_os("OVERSPILL_REQUIRE_NVRTC").is_some_and(|value| value == "1");
            assert!(!required, "{error}");
            eprintln!("left out: {error}");
            None
        }
    }
}

/// Kernels whose launch bounds cost a few spilled words a thread on some architecture, and how many bytes at most:
/// mode D of 32-bit words has 24 warps a block, and 80 registers do not hold it on sm_100 and sm_120; counting of
/// 16-bit words has six blocks a multiprocessor, mode G of them two of 640 threads, and both were measured with their
/// bytes on sm_90. The encoder of mode F has four blocks, which 32-bit words fit but for 12 bytes on sm_80.
const SPILLED_BYTES: [(&str, u32); 4] = [
    ("`tpde_dense_32`", 60),
    ("`tpde_count_16`", 8),
    ("`tpde_groups_16`", 32),
    ("`tpde_encode_flags_32`", 12),
];

#[test]
fn the_committed_table_is_what_compiles_and_no_other_kernel_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let now = table::markdown(&nvrtc).expect("every kernel compiles for every architecture");
    let mut kernels = 0;
    for line in now.lines().filter(|line| line.contains(".cu |")) {
        // Cells of registers / shared memory / stack / spills.
        let cells: Vec<Vec<&str>> =
            line.split('|').skip(3).map(|cell| cell.split('/').map(str::trim).collect()).collect();
        let told: Vec<_> = cells.iter().filter(|cell| cell.len() == 4).collect();
        assert_eq!(told.len(), table::ARCHITECTURES.len(), "{line}");
        let spills = |cell: &[&str]| cell[3].parse::<u32>().expect("a number of bytes");
        let known = SPILLED_BYTES.iter().find(|(kernel, _)| line.contains(kernel)).map_or(0, |known| known.1);
        assert!(told.iter().all(|cell| cell[0] != "0" && spills(cell) <= known), "spills: {line}");
        kernels += 1;
    }
    assert!(kernels > 10, "{kernels} kernels in the table");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kernels.md");
    let committed = std::fs::read_to_string(path).expect("docs/kernels.md");
    if committed.contains("NVRTC 13.0 ") && nvrtc.version() != (13, 0) {
        eprintln!("left out: the table is of NVRTC 13.0, this is {:?}", nvrtc.version());
        return;
    }
    assert!(committed == now, "docs/kernels.md is out of date: run the example kernel_table");
}

#[test]
fn what_does_not_compile_says_why() {
    let Some(nvrtc) = nvrtc() else { return };
    let broken =
        kernels::Source { name: "broken.cu", text: "__global__ void f() { nonsense; }", options: &[] };
    let error = nvrtc.compile(&broken, 90).expect_err("nonsense");
    let Error::Compile { source_name: "broken.cu", compute_capability: 90, log } = error else {
        panic!("{error}")
    };
    assert!(log.contains("nonsense"), "{log}");
}

#[test]
fn the_cache_gives_what_was_compiled() {
    let Some(nvrtc) = nvrtc() else { return };
    let folder = std::env::temp_dir().join(format!("overspill-kernels-{}", std::process::id()));
    let cache = KernelCache::at(folder.clone());
    let first = cache.cubin(&nvrtc, &kernels::MEMORY, 90).expect("compiles");
    let files = std::fs::read_dir(&folder).expect("folder").count();
    let second = cache.cubin(&nvrtc, &kernels::MEMORY, 90).expect("is there");
    let other = cache.cubin(&nvrtc, &kernels::MEMORY, 80).expect("compiles");
    std::fs::remove_dir_all(&folder).expect("removed");
    assert_eq!(files, 1);
    assert!(first == second && first != other && first.starts_with(b"\x7fELF"));
}
