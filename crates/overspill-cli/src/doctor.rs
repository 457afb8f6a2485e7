//! `overspill doctor`: what this machine has, how fast it is, and what to change.

use std::{path::PathBuf, time::Instant};

use overspill_device::{
    DeviceRef,
    cuda::{CudaConfig, CudaDevice},
    facts::{self, Facts},
    measure::{self, LinkSpeed},
    sim::SimDevice,
};
use overspill_engine::storage::{DirectFile, Storage};
use serde_json::{Value, json};

use crate::Failure;

const MIB: usize = 1 << 20;
const GIB: f64 = (1u64 << 30) as f64;

/// Shows what overspill finds on this machine, measures the link and the disk, and says what to change.
///
/// Examples:
///   overspill doctor
///   overspill doctor --json --spill-dir /mnt/nvme
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// Folder whose disk is measured (256 MiB are written and removed).
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    spill_dir: PathBuf,
}

/// What was measured, or why it could not be.
struct Speeds {
    link: Result<LinkSpeed, String>,
    reserve_gib_per_s: Result<f64, String>,
    disk: Result<DiskSpeed, String>,
}

/// The spill folder's disk.
struct DiskSpeed {
    write_gbps: f64,
    read_gbps: f64,
    /// Past the page cache.
    direct: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let facts = facts::gather();
    let speeds = Speeds::measure(&facts, args);
    let advice = advice(&facts, &speeds);
    if args.json {
        println!("{:#}", to_json(&facts, &speeds, &advice));
    } else {
        print_report(&facts, &speeds, &advice);
    }
    Ok(())
}

impl Speeds {
    fn measure(facts: &Facts, args: &Args) -> Self {
        let device: Result<DeviceRef, String> = match &facts.cuda {
            Ok(cuda) if !cuda.gpus.is_empty() => CudaDevice::open(CudaConfig::default())
                .map(|device| device as DeviceRef)
                .map_err(|error| error.to_string()),
            _ => Ok(SimDevice::threads() as DeviceRef),
        };
        Self {
            link: device
                .clone()
                .and_then(|device| measure::link(&device, 64 * MIB, 4).map_err(|error| error.to_string())),
            reserve_gib_per_s: device.and_then(|device| {
                measure::reserve_gib_per_s(&device, 256 * MIB).map_err(|error| error.to_string())
            }),
            disk: disk(args).map_err(|error| error.to_string()),
        }
    }
}

/// Writes and reads 256 MiB past the page cache where the file system allows it.
fn disk(args: &Args) -> std::io::Result<DiskSpeed> {
    let file = DirectFile::create_in(&args.spill_dir)?;
    let slab = overspill_device::Device::alloc_host(&*SimDevice::threads(), 16 * MIB)
        .map_err(std::io::Error::other)?;
    let mut extent = slab.claim(0..16 * MIB).map_err(std::io::Error::other)?;
    let buffer = extent.as_mut_slice().map_err(std::io::Error::other)?;
    buffer.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
    let mut timed = |write: bool| -> std::io::Result<f64> {
        let begin = Instant::now();
        for piece in 0..16 {
            let offset_bytes = piece * 16 * MIB as u64;
            if write { file.write_at(offset_bytes, buffer)? } else { file.read_at(offset_bytes, buffer)? }
        }
        Ok(256.0 * MIB as f64 / begin.elapsed().as_secs_f64() / 1e9)
    };
    let (write_gbps, read_gbps) = (timed(true)?, timed(false)?);
    Ok(DiskSpeed { write_gbps, read_gbps, direct: file.is_direct() })
}

/// What to change, most useful first.
fn advice(facts: &Facts, speeds: &Speeds) -> Vec<String> {
    let mut advice = Vec::new();
    if let Err(reason) = &facts.cuda {
        advice.push(format!("no GPU is used ({reason}): RAM is the device tier and disk the next"));
    }
    if let (Ok(_), Err(reason)) = (&facts.cuda, &facts.nvrtc) {
        advice.push(format!("kernels cannot be compiled: {reason}"));
    }
    if let Some(limit) = facts.host.lock_limit_bytes.filter(|_| facts.cuda.is_ok()) {
        advice.push(format!("`ulimit -l` is {:.1} GiB: raise it to page-lock more", limit as f64 / GIB));
    }
    if !facts.host.huge_pages && facts.cuda.is_ok() {
        advice
            .push("huge pages are off: enable transparent huge pages (madvise) for faster copies".to_owned());
    }
    if facts.host.wsl {
        advice.push("this is WSL2, which caps page-locked memory: give a smaller --host-budget".to_owned());
    }
    if let Err(reason) = &speeds.link {
        advice.push(format!("the link could not be measured: {reason}"));
    }
    if let Err(reason) = &speeds.reserve_gib_per_s {
        advice.push(format!("host memory could not be reserved: {reason}"));
    }
    match &speeds.disk {
        Err(reason) => {
            advice.push(format!("the spill folder cannot be used ({reason}): name another with --spill-dir"));
        }
        Ok(disk) if !disk.direct => advice.push(
            "the spill folder has no direct I/O (tmpfs?): what is spilled there fills the page cache, name \
             another with --spill-dir"
                .to_owned(),
        ),
        Ok(_) => {}
    }
    advice
}

fn to_json(facts: &Facts, speeds: &Speeds, advice: &[String]) -> Value {
    let gpus = |cuda: &facts::CudaFacts| -> Vec<Value> {
        cuda.gpus
            .iter()
            .map(|gpu| {
                json!({
                    "name": gpu.name, "compute_capability": gpu.compute_capability,
                    "total_bytes": gpu.total_bytes, "free_bytes": gpu.free_bytes, "batch_copies": gpu.batch_copies,
                })
            })
            .collect()
    };
    json!({
        "host": {
            "cores": facts.host.cores,
            "total_bytes": facts.host.total_bytes,
            "available_bytes": facts.host.available_bytes,
            "lock_limit_bytes": facts.host.lock_limit_bytes,
            "transparent_huge_pages": facts.host.transparent_huge_pages,
            "huge_pages": facts.host.huge_pages,
            "wsl": facts.host.wsl,
        },
        "cuda": facts.cuda.as_ref().map_or_else(
            |reason| json!({"absent": reason}),
            |cuda| json!({"driver_version": cuda.driver_version, "gpus": gpus(cuda)}),
        ),
        "nvrtc": facts.nvrtc.as_ref().map_or_else(
            |reason| json!({"absent": reason}),
            |found| json!({"path": found.path, "version": format!("{}.{}", found.version.0, found.version.1)}),
        ),
        "link": speeds.link.as_ref().map_or_else(
            |reason| json!({"absent": reason}),
            |link| json!({
                "copy_bytes": link.copy_bytes, "offload_gbps": link.offload_gbps,
                "onboard_gbps": link.onboard_gbps, "both_gbps": link.both_gbps,
            }),
        ),
        "reserve_gib_per_s": speeds.reserve_gib_per_s.as_ref().ok(),
        "disk": speeds.disk.as_ref().map_or_else(
            |reason| json!({"absent": reason}),
            |disk| json!({
                "write_gbps": disk.write_gbps, "read_gbps": disk.read_gbps, "direct_io": disk.direct,
            }),
        ),
        "advice": advice,
    })
}

fn print_report(facts: &Facts, speeds: &Speeds, advice: &[String]) {
    let gib =
        |bytes: Option<u64>| bytes.map_or("?".to_owned(), |bytes| format!("{:.1} GiB", bytes as f64 / GIB));
    let host = &facts.host;
    println!(
        "host     {} cores, {} of {} free",
        host.cores,
        gib(host.available_bytes),
        gib(host.total_bytes)
    );
    println!(
        "pinning  limit {}, huge pages {} ({})",
        host.lock_limit_bytes.map_or("none".to_owned(), |bytes| gib(Some(bytes))),
        if host.huge_pages { "yes" } else { "no" },
        host.transparent_huge_pages.as_deref().unwrap_or("unknown"),
    );
    match &facts.cuda {
        Ok(cuda) => {
            for gpu in &cuda.gpus {
                println!(
                    "gpu      {}, {} of {} free, compute capability {}.{}",
                    gpu.name,
                    gib(Some(gpu.free_bytes)),
                    gib(Some(gpu.total_bytes)),
                    gpu.compute_capability / 10,
                    gpu.compute_capability % 10
                );
            }
        }
        Err(_) => println!("gpu      none"),
    }
    if let Ok(nvrtc) = &facts.nvrtc {
        println!("nvrtc    {}.{} at {}", nvrtc.version.0, nvrtc.version.1, nvrtc.path);
    }
    if let Ok(link) = &speeds.link {
        println!(
            "link     offload {:.1} GB/s, onboard {:.1} GB/s, both at once {:.1} GB/s each ({} MiB copies)",
            link.offload_gbps,
            link.onboard_gbps,
            link.both_gbps,
            link.copy_bytes / MIB
        );
    }
    if let Ok(speed) = &speeds.reserve_gib_per_s {
        println!("reserve  {speed:.1} GiB/s of host memory");
    }
    if let Ok(disk) = &speeds.disk {
        println!(
            "disk     write {:.1} GB/s, read {:.1} GB/s{}",
            disk.write_gbps,
            disk.read_gbps,
            if disk.direct { "" } else { " through the page cache" },
        );
    }
    for line in advice {
        println!("advice   {line}");
    }
}
