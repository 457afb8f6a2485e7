//! Small states to commit.

use std::path::Path;

use overspill_tpde::checkpoint::MemoryTensor;
use overspill_tpde::{Checkpoint, Kind, Options};

/// One thread, no more memory than small states need.
pub const OPTIONS: Options = Options { memory_bytes: 64 << 20, threads: 1 };

/// A state of two bf16 tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    tensors: Vec<(String, Vec<u8>)>,
}

impl State {
    pub fn new(random: &mut fastrand::Rng) -> Self {
        let tensor = |name: &str, words: usize, random: &mut fastrand::Rng| {
            let bytes =
                (0..words).flat_map(|_| (0x3c00u16 | random.u16(..) & 0x83ff).to_le_bytes()).collect();
            (name.to_owned(), bytes)
        };
        State { tensors: vec![tensor("a", 700, random), tensor("b", 64, random)] }
    }

    /// Some words move by an ULP.
    pub fn train(&mut self, random: &mut fastrand::Rng, share: f64) {
        for (_, bytes) in &mut self.tensors {
            for word in bytes.chunks_exact_mut(2) {
                if random.f64() < share {
                    let old = u16::from_le_bytes([word[0], word[1]]);
                    word.copy_from_slice(&(old ^ 1).wrapping_add(random.u16(0..2)).to_le_bytes());
                }
            }
        }
    }

    pub fn checkpoint(&self) -> Checkpoint<'_> {
        let tensors = self.tensors.iter().map(|(name, bytes)| MemoryTensor {
            name: name.clone(),
            kind: Kind::from_name("BF16").expect("known"),
            shape: vec![bytes.len() as u64 / 2],
            bytes,
        });
        Checkpoint::from_memory("state", tensors.collect()).expect("well formed")
    }

    /// Whether the file at `path` holds exactly this state.
    pub fn is_in(&self, path: &Path) -> bool {
        let id = |checkpoint: &Checkpoint<'_>| {
            overspill_tpde::state_id(checkpoint, &OPTIONS, &|_, _| ()).expect("read")
        };
        id(&self.checkpoint()) == id(&Checkpoint::open(path).expect("opens"))
    }
}
