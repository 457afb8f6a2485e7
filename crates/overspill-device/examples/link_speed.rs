//! Measures the link and the reserving of page-locked memory in each of its kinds, as JSON lines.
//!
//! `cargo run --release -p overspill-device --example link_speed -- [GIB_TO_RESERVE]`; the machine is
//! to be quiet.

use overspill_device::{
    DeviceRef, Result,
    cuda::{CudaConfig, CudaDevice, HostMemory},
    facts, measure,
};

fn main() -> Result<()> {
    let gib: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(8);
    eprintln!("{:#?}", facts::gather());
    for host_memory in [HostMemory::Registered, HostMemory::Allocated, HostMemory::Pageable] {
        let cuda = CudaDevice::open(CudaConfig { host_memory, ..CudaConfig::default() })?;
        let device = cuda as DeviceRef;
        let reserve = measure::reserve_gib_per_s(&device, gib << 30)?;
        println!(
            "{{\"kind\": \"{host_memory:?}\", \"reserve_gib\": {gib}, \"reserve_gib_per_s\": {reserve:.2}}}"
        );
        for shift in [16, 20, 24, 28] {
            let copies = 8usize.max((64 << 20) >> shift);
            let speed = measure::link(&device, 1 << shift, copies)?;
            println!(
                "{{\"kind\": \"{host_memory:?}\", \"copy_bytes\": {}, \"offload_gbps\": {:.2}, \"onboard_gbps\": {:.2}, \
                 \"both_gbps\": {:.2}}}",
                speed.copy_bytes, speed.offload_gbps, speed.onboard_gbps, speed.both_gbps
            );
        }
    }
    Ok(())
}
