//! The simulated device as a rig.

use std::{sync::Arc, time::Duration};

use overspill_device::{
    DeviceRange, DeviceRef, StreamRef,
    sim::{SimConfig, SimDevice, SimQueue},
};

use super::{Rig, folded};

pub struct SimRig {
    sim: Arc<SimDevice>,
    device: DeviceRef,
    seed: Option<u64>,
}

impl SimRig {
    pub fn threads() -> Self {
        Self::on(SimDevice::threads(), None)
    }

    pub fn seeded(config: SimConfig) -> Self {
        Self::on(SimDevice::seeded(config), Some(config.seed))
    }

    fn on(sim: Arc<SimDevice>, seed: Option<u64>) -> Self {
        Self { device: Arc::clone(&sim) as DeviceRef, sim, seed }
    }

    fn launch(&self, stream: &StreamRef, kernel: impl FnOnce(&SimDevice) + Send + 'static) {
        let sim = Arc::clone(&self.sim);
        stream.as_any().downcast_ref::<SimQueue>().expect("a stream of ours").launch(move || kernel(&sim));
    }
}

impl Rig for SimRig {
    fn device(&self) -> &DeviceRef {
        &self.device
    }

    fn stream(&self) -> StreamRef {
        self.device.new_stream("compute").expect("stream")
    }

    fn fill(&self, stream: &StreamRef, range: &DeviceRange, value: u8) {
        let range = range.clone();
        self.launch(stream, move |sim| sim.write(&range, &vec![value; range.bytes()]));
    }

    fn fold(&self, stream: &StreamRef, range: &DeviceRange, value: u8) {
        let range = range.clone();
        self.launch(stream, move |sim| sim.write(&range, &folded(&sim.read(&range), value)));
    }

    fn copy(&self, stream: &StreamRef, to: &DeviceRange, from: &DeviceRange) {
        let (to, from) = (to.clone(), from.clone());
        self.launch(stream, move |sim| sim.write(&to, &sim.read(&from)));
    }

    fn linger(&self, stream: &StreamRef) {
        match self.seed {
            None => self.launch(stream, |_| std::thread::sleep(Duration::from_millis(3))),
            // Time there is a number of operations.
            Some(_) => (0..6).for_each(|_| self.launch(stream, |_| {})),
        }
    }

    fn write(&self, range: &DeviceRange, bytes: &[u8]) {
        self.sim.write(range, bytes);
    }

    fn read(&self, range: &DeviceRange) -> Vec<u8> {
        self.sim.read(range)
    }

    fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }
}
