//! A model of a few bytes that attends to all it has seen, on the simulated device and in plain
//! memory: the second says what every token has to be.

#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use overspill_device::{
    Device, DeviceRange, DeviceRef, Stream, StreamRef,
    sim::{Planted, SimConfig, SimDevice, SimQueue},
};
use overspill_djinn::{Geometry, Part, Pool, PoolConfig};
use overspill_engine::{
    HostPool, SpillFile,
    storage::{DirectFile, Fault, FaultyStorage},
};

pub const GEOMETRY: Geometry = Geometry { layers: 3, tokens: 12, token_bytes: 40 };

/// Everything is written through at once.
pub const CONFIG: PoolConfig =
    PoolConfig { geometry: GEOMETRY, write_through: true, flush_bytes: 1, lag_tokens: 0, tail_tokens: 4 };

/// The hidden state after a whole step of `id` with `token`.
pub fn step(rig: &Rig, pool: &mut Pool, id: u64, token: u64) -> u64 {
    let position = pool.tokens(id).expect("known")[0];
    let slab = pool.begin(id).expect("room").slab;
    let hidden = Arc::new(Mutex::new(embed(token, position)));
    for layer in 0..GEOMETRY.layers {
        pool.touch(id, layer, &rig.stream()).expect("known");
        rig.launch(slab, layer, position, &hidden);
        pool.wrote(id, layer, position + 1, &rig.stream()).expect("fits");
    }
    pool.park(id, None, &rig.stream()).expect("running");
    rig.compute.synchronize().expect("done");
    *hidden.lock().expect("not poisoned")
}

/// The device, the arena and the host memory that many schedules share: a seeded device never frees.
pub struct Rig {
    pub device: Arc<SimDevice>,
    pub compute: Arc<SimQueue>,
    pub arena: DeviceRange,
    pub host: HostPool,
    pub spill: Option<SpillFile>,
    /// Whether the disk fails now and then.
    pub faulty: bool,
}

impl Rig {
    pub fn new(
        seed: u64,
        slabs: usize,
        host_pages: usize,
        planted: Planted,
        spill: Option<SpillFile>,
    ) -> Self {
        let device = SimDevice::seeded(SimConfig { seed, planted, ..SimConfig::default() });
        let compute = device.new_sim_queue("compute").expect("queue");
        let arena = device.alloc_device(slabs * GEOMETRY.slab_bytes()).expect("memory");
        let shared: DeviceRef = device.clone();
        let host = HostPool::new(shared, host_pages * 4096, host_pages * 4096);
        Self { device, compute, arena, host, spill, faulty: false }
    }

    pub fn stream(&self) -> StreamRef {
        self.compute.clone()
    }

    pub fn pool(&self, config: PoolConfig) -> Pool {
        let shared: DeviceRef = self.device.clone();
        Pool::new(shared, self.arena.clone(), self.host.clone(), self.spill.clone(), config).expect("pool")
    }

    /// Enqueues what `layer` does for a token at `position` in `slab`.
    pub fn launch(&self, slab: usize, layer: usize, position: usize, hidden: &Arc<Mutex<u64>>) {
        let range = |part, tokens: std::ops::Range<usize>| {
            let bytes = GEOMETRY.bytes_of(layer, part, tokens);
            let start = slab * GEOMETRY.slab_bytes();
            self.arena.slice(start + bytes.start..start + bytes.end).expect("in the arena")
        };
        let new = Part::BOTH.map(|part| range(part, position..position + 1));
        let all = Part::BOTH.map(|part| range(part, 0..position + 1));
        let (device, hidden) = (Arc::clone(&self.device), Arc::clone(hidden));
        self.compute.launch(move || {
            let mut hidden = hidden.lock().expect("not poisoned");
            let rows = rows(*hidden, layer);
            device.write(&new[0], &rows[0]);
            device.write(&new[1], &rows[1]);
            *hidden = attend(*hidden, &device.read(&all[0]), &device.read(&all[1]));
        });
    }
}

/// Keys and values of a token.
fn rows(hidden: u64, layer: usize) -> [Vec<u8>; 2] {
    [1, 2].map(|part| {
        let mut rng = fastrand::Rng::with_seed(hidden ^ (part << 32) ^ layer as u64);
        (0..GEOMETRY.token_bytes).map(|_| rng.u8(..)).collect()
    })
}

fn attend(hidden: u64, keys: &[u8], values: &[u8]) -> u64 {
    keys.iter().chain(values).fold(hidden ^ 0x9E37_79B9, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3).rotate_left(7)
    })
}

/// The hidden state that a token starts from.
pub fn embed(token: u64, position: usize) -> u64 {
    token.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ position as u64
}

/// The same model in plain memory.
#[derive(Clone, Default)]
pub struct Twin {
    layers: Vec<[Vec<u8>; 2]>,
}

impl Twin {
    /// Runs a token; what the last layer puts out.
    pub fn step(&mut self, token: u64, position: usize, steer: Option<(usize, u64)>) -> u64 {
        self.layers.resize(GEOMETRY.layers, Default::default());
        let mut hidden = embed(token, position);
        for (layer, parts) in self.layers.iter_mut().enumerate() {
            let [keys, values] = rows(hidden, layer);
            parts[0].extend(keys);
            parts[1].extend(values);
            hidden = attend(hidden, &parts[0], &parts[1]);
            if let Some((_, change)) = steer.filter(|(at, _)| *at == layer) {
                hidden ^= change;
            }
        }
        hidden
    }
}

pub fn spill_file(fault: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static) -> SpillFile {
    let file = DirectFile::create_in(&std::env::temp_dir()).expect("temporary folder");
    SpillFile::on(Box::new(FaultyStorage::new(file, fault)), 1 << 20)
}
