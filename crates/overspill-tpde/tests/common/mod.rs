//! Small states in memory and on disk.

#![allow(dead_code, reason = "each test file uses its own part")]

use overspill_tpde::checkpoint::MemoryTensor;
use overspill_tpde::{Checkpoint, Dtype, Kind, PackOptions, Patch, apply_into, pack_to_pieces};

/// A named tensor that owns its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

pub type State = Vec<Owned>;

pub fn owned(name: &str, dtype: Dtype, shape: &[u64], bytes: Vec<u8>) -> Owned {
    Owned { name: name.into(), dtype, shape: shape.to_vec(), bytes }
}

pub fn checkpoint(state: &State) -> Checkpoint<'_> {
    let tensors = state.iter().map(|t| MemoryTensor {
        name: t.name.clone(),
        kind: Kind::Plain(t.dtype),
        shape: t.shape.clone(),
        bytes: &t.bytes,
    });
    Checkpoint::from_memory("state", tensors.collect()).expect("a valid state")
}

/// bf16 weights around zero.
pub fn weights(rng: &mut fastrand::Rng, words: usize) -> Vec<u8> {
    let value = |rng: &mut fastrand::Rng| (rng.f32() - 0.5) * 2f32.powi(-(rng.i32(0..12)));
    (0..words).flat_map(|_| ((value(rng).to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// `share` of the words moved by one step.
pub fn nudged(rng: &mut fastrand::Rng, bytes: &[u8], share: f64) -> Vec<u8> {
    let mut moved = bytes.to_vec();
    for word in moved.chunks_exact_mut(2) {
        if rng.f64() < share {
            let bits = u16::from_le_bytes([word[0], word[1]]).wrapping_add(1);
            word.copy_from_slice(&bits.to_le_bytes());
        }
    }
    moved
}

/// A base and a final: changed, unchanged, added, removed, reshaped and re-typed tensors.
pub fn pair(seed: u64, words: usize) -> (State, State) {
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let changed = weights(&mut rng, words);
    let still = weights(&mut rng, 64);
    let moved = nudged(&mut rng, &changed, 0.03);
    let base = vec![
        owned("changed", Dtype::Bf16, &[words as u64 / 8, 8], changed),
        owned("still", Dtype::Bf16, &[64], still.clone()),
        owned("removed", Dtype::F32, &[4], weights(&mut rng, 8)),
        owned("reshaped", Dtype::Bf16, &[8, 8], still.clone()),
        owned("retyped", Dtype::Bf16, &[64], still.clone()),
        owned("empty", Dtype::F64, &[0, 7], vec![]),
    ];
    let last = vec![
        owned("still", Dtype::Bf16, &[64], still.clone()),
        owned("changed", Dtype::Bf16, &[words as u64 / 8, 8], moved),
        owned("reshaped", Dtype::Bf16, &[64], nudged(&mut rng, &still, 0.5)),
        owned("retyped", Dtype::F32, &[32], still),
        owned("added", Dtype::I64, &[], weights(&mut rng, 4)),
        owned("empty", Dtype::F64, &[0, 7], vec![]),
    ];
    (base, last)
}

pub fn quiet(_: u64, _: u64) {}

pub fn packed(base: Option<&State>, last: &State, options: &PackOptions) -> Vec<u8> {
    let base = base.map(checkpoint);
    pack_to_pieces(base.as_ref(), &checkpoint(last), options, &quiet).expect("packs").1.concat()
}

/// The state that a patch makes, in the manifest's order.
pub fn applied(patch: &[u8], base: Option<&State>) -> overspill_tpde::Result<State> {
    let patch = Patch::from_bytes("patch", patch)?;
    let entries = patch.manifest().entries();
    let mut made: State = entries
        .iter()
        .map(|entry| {
            let overspill_tpde::Kind::Plain(dtype) = entry.tensor.kind else {
                unreachable!("finals are plain")
            };
            // What a corrupt header declares is not believed: no test state is larger than this.
            let bytes = if entry.tensor.bytes < 1 << 20 { entry.tensor.bytes as usize } else { 0 };
            owned(&entry.tensor.name, dtype, &entry.tensor.shape, vec![0; bytes])
        })
        .collect();
    let outs = made.iter_mut().map(|t| t.bytes.as_mut_slice()).collect();
    let base = base.map(checkpoint);
    apply_into(&patch, base.as_ref(), None, outs, &Default::default(), &quiet)?;
    Ok(made)
}
