//! How fast this machine moves bytes: the link by direction, and the reserving of host memory.
//!
//! Runs on any backend, through the same streams and leases as the engine's own copies. Takes the
//! link for itself while it measures; nobody else's load is taken out.

use std::{sync::Arc, time::Instant};

use crate::{
    DeviceRange, DeviceRef, EventRef, HostExtent, HostSlab, InFlight, Result, StreamRef, offload, onboard,
};

/// Speed of the link, in units of 1e9 bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkSpeed {
    /// Bytes of each copy.
    pub copy_bytes: usize,
    /// Away from the device.
    pub offload_gbps: f64,
    /// Toward the device.
    pub onboard_gbps: f64,
    /// Each direction while both run.
    pub both_gbps: f64,
}

/// Measures the link with `copies` copies of `copy_bytes` a direction, one after the other. Takes
/// `2 * copies * copy_bytes` of host memory and `2 * copy_bytes` of the device's.
pub fn link(device: &DeviceRef, copy_bytes: usize, copies: usize) -> Result<LinkSpeed> {
    let (out, back) = (device.new_stream("measure")?, device.new_stream("measure")?);
    let (source, destination) = (device.alloc_device(copy_bytes)?, device.alloc_device(copy_bytes)?);
    let total_bytes = copy_bytes * copies;
    let (first, second) = (device.alloc_host(total_bytes)?, device.alloc_host(total_bytes)?);
    // The first copies pay for page tables and for clocks that are still low.
    drop(offload_all(&out, &source, &second, copies)?);

    let (going, extents) = offload_all(&out, &source, &first, copies)?;
    let offload_us = going.duration_us()?;
    let onboard_us = onboard_all(&back, &destination, &extents)?.duration_us()?;
    let (going, _extents) = offload_all(&out, &source, &second, copies)?;
    let coming = onboard_all(&back, &destination, &extents)?;
    let both_us = going.span_us()?.1.max(coming.span_us()?.1) - going.span_us()?.0.min(coming.span_us()?.0);
    let gbps = |us: f64| total_bytes as f64 / us / 1e3;
    Ok(LinkSpeed {
        copy_bytes,
        offload_gbps: gbps(offload_us),
        onboard_gbps: gbps(onboard_us),
        both_gbps: gbps(both_us),
    })
}

/// Speed at which host memory is reserved, in GiB a second. The memory is given back.
pub fn reserve_gib_per_s(device: &DeviceRef, bytes: usize) -> Result<f64> {
    let started = Instant::now();
    let slab = device.alloc_host(bytes)?;
    let seconds = started.elapsed().as_secs_f64();
    drop(slab);
    Ok(bytes as f64 / f64::from(1 << 30) / seconds)
}

/// Copies with an event on either side.
struct Timed {
    start: EventRef,
    end: EventRef,
    _in_flight: Vec<InFlight>,
}

impl Timed {
    fn span_us(&self) -> Result<(f64, f64)> {
        self.end.synchronize()?;
        Ok((self.start.time_us()?, self.end.time_us()?))
    }

    fn duration_us(&self) -> Result<f64> {
        self.span_us().map(|(start, end)| end - start)
    }
}

fn offload_all(
    stream: &StreamRef,
    source: &DeviceRange,
    slab: &HostSlab,
    copies: usize,
) -> Result<(Timed, Vec<Arc<HostExtent>>)> {
    let (start, bytes) = (stream.record()?, source.bytes());
    let (mut in_flight, mut extents) = (Vec::new(), Vec::new());
    for copy in 0..copies {
        let extent = slab.claim(copy * bytes..(copy + 1) * bytes)?;
        let (sent, filled) = offload(stream, vec![(source.clone(), extent)])?;
        in_flight.push(sent);
        extents.extend(filled);
    }
    Ok((Timed { start, end: stream.record()?, _in_flight: in_flight }, extents))
}

fn onboard_all(stream: &StreamRef, destination: &DeviceRange, extents: &[Arc<HostExtent>]) -> Result<Timed> {
    let start = stream.record()?;
    let send = |extent: &Arc<HostExtent>| onboard(stream, vec![(destination.clone(), Arc::clone(extent))]);
    let in_flight = extents.iter().map(send).collect::<Result<_>>()?;
    Ok(Timed { start, end: stream.record()?, _in_flight: in_flight })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimDevice;

    #[test]
    fn measures_and_gives_everything_back() {
        let device: DeviceRef = SimDevice::threads();
        let speed = link(&device, 1 << 20, 3).expect("measured");
        assert!(speed.offload_gbps > 0.0 && speed.onboard_gbps > 0.0 && speed.both_gbps > 0.0);
        assert!(reserve_gib_per_s(&device, 1 << 20).expect("measured") > 0.0);
    }
}
