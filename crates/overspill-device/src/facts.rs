//! What this machine has that overspill's speed depends on, for a doctor to print.
//!
//! Asking is cheap and never fails: what cannot be found out is absent, and a GPU that is not there is
//! an error kept as text. Measuring is in [`crate::measure`].

use std::fs;

use crate::{
    Result,
    cuda::{CudaConfig, CudaDevice, device_count, driver_version, huge_pages_possible},
    nvrtc::Nvrtc,
};

/// The host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Cores that the process may use.
    pub cores: usize,
    /// Memory, in bytes. Some virtual machines say less than they will give.
    pub total_bytes: Option<u64>,
    /// Memory that can still be taken, in bytes.
    pub available_bytes: Option<u64>,
    /// Most that the process may lock (`ulimit -l`), in bytes; absent where there is no limit.
    pub lock_limit_bytes: Option<u64>,
    /// Transparent huge pages: `always`, `madvise` or `never`.
    pub transparent_huge_pages: Option<String>,
    /// Whether a mapping can get huge pages at all.
    pub huge_pages: bool,
    /// Whether this is Windows' Linux, which caps page-locked memory.
    pub wsl: bool,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuFacts {
    /// Product name.
    pub name: String,
    /// As 10 * major + minor.
    pub compute_capability: u32,
    /// Device memory, in bytes.
    pub total_bytes: u64,
    /// Device memory free now, in bytes.
    pub free_bytes: u64,
    /// Whether the driver takes several copies in one call.
    pub batch_copies: bool,
}

/// The driver and its GPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaFacts {
    /// Version of the driver's API, as 1000 * major + 10 * minor.
    pub driver_version: i32,
    /// The GPUs that the process may use.
    pub gpus: Vec<GpuFacts>,
}

/// The run-time compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvrtcFacts {
    /// Where it was found.
    pub path: String,
    /// Major and minor version.
    pub version: (i32, i32),
}

/// What [`gather`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The host.
    pub host: HostFacts,
    /// The GPUs, or why there are none and what to do.
    pub cuda: std::result::Result<CudaFacts, String>,
    /// The compiler, or why there is none and what to do.
    pub nvrtc: std::result::Result<NvrtcFacts, String>,
}

/// Looks at the machine. Opens each GPU for a moment.
#[must_use]
pub fn gather() -> Facts {
    Facts {
        host: host(),
        cuda: cuda().map_err(|error| error.to_string()),
        nvrtc: Nvrtc::find(None)
            .map(|found| NvrtcFacts { path: found.path().display().to_string(), version: found.version() })
            .map_err(|error| error.to_string()),
    }
}

fn host() -> HostFacts {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    let version = fs::read_to_string("/proc/version").unwrap_or_default();
    HostFacts {
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        total_bytes: kib_of(&memory, "MemTotal:"),
        available_bytes: kib_of(&memory, "MemAvailable:"),
        lock_limit_bytes: limit.current,
        transparent_huge_pages: fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
            .ok()
            .and_then(|modes| Some(modes.split_once('[')?.1.split_once(']')?.0.to_owned())),
        huge_pages: huge_pages_possible(),
        wsl: version.to_lowercase().contains("microsoft"),
    }
}

fn kib_of(table: &str, key: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn cuda() -> Result<CudaFacts> {
    let gpus = (0..device_count()?).map(gpu).collect::<Result<_>>()?;
    Ok(CudaFacts { driver_version: driver_version()?, gpus })
}

fn gpu(ordinal: usize) -> Result<GpuFacts> {
    let device = CudaDevice::open(CudaConfig { ordinal, ..CudaConfig::default() })?;
    let info = crate::Device::info(&*device);
    Ok(GpuFacts {
        name: info.name.clone(),
        compute_capability: device.compute_capability()?,
        total_bytes: info.total_bytes.unwrap_or(0),
        free_bytes: device.free_bytes()? as u64,
        batch_copies: device.has_batch_copies(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_tables_of_the_kernel() {
        let table = "MemTotal:       16 kB\nMemFree:         8 kB\nMemAvailable:   12 kB\n";
        assert_eq!(kib_of(table, "MemAvailable:"), Some(12 * 1024));
        assert_eq!(kib_of(table, "Swap:"), None);
        assert_eq!(kib_of("MemTotal: 18446744073709551615 kB", "MemTotal:"), None);
    }

    #[test]
    fn a_machine_without_a_gpu_is_told_what_to_do() {
        let facts = gather();
        assert!(facts.host.cores > 0);
        match facts.cuda {
            Ok(cuda) => assert!(cuda.driver_version > 0),
            Err(reason) => assert!(reason.contains("driver"), "{reason}"),
        }
    }
}
