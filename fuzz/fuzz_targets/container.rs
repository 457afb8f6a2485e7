//! A damaged `.tpde` file, or any bytes in its place: an error or exactly the state that was packed.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use overspill_fuzz::damage;
use overspill_tpde::checkpoint::MemoryTensor;
use overspill_tpde::{Checkpoint, Dtype, Kind, Options, PackOptions, Patch, apply_into, pack_to_pieces};

const OPTIONS: Options = Options { memory_bytes: 1 << 26, threads: 1 };

fn quiet(_: u64, _: u64) {}

/// Two tensors: weights that change a little, and a mask that does not.
fn state(change: u8) -> [Vec<u8>; 2] {
    let weights = (0..400u32).flat_map(|i| {
        let bits = (0.01 + (i as f32).sin() * 0.05).to_bits() >> 16;
        (bits as u16 ^ u16::from(if i % 9 == 0 { change } else { 0 })).to_le_bytes()
    });
    [weights.collect(), vec![1; 40]]
}

fn checkpoint(state: &[Vec<u8>; 2]) -> Checkpoint<'_> {
    let tensors = [("weight", Dtype::Bf16, vec![20, 20]), ("mask", Dtype::Bool, vec![40])];
    let tensors = tensors.into_iter().zip(state).map(|((name, dtype, shape), bytes)| MemoryTensor {
        name: name.into(),
        kind: Kind::Plain(dtype),
        shape,
        bytes: bytes.as_slice(),
    });
    Checkpoint::from_memory("state", tensors.collect()).expect("two tensors")
}

static STATES: LazyLock<[[Vec<u8>; 2]; 2]> = LazyLock::new(|| [state(0), state(1)]);
static PATCH: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let [base, last] = STATES.each_ref().map(checkpoint);
    pack_to_pieces(Some(&base), &last, &PackOptions::default(), &quiet).expect("two states").1.concat()
});

fuzz_target!(|input: &[u8]| {
    let [how, rest @ ..] = input else { return };
    let mut bytes = PATCH.clone();
    match how % 3 {
        0 => bytes = rest.to_vec(),
        1 => bytes.truncate(rest.len()),
        _ => damage(rest, &mut [&mut bytes]),
    }
    let Ok(patch) = Patch::from_bytes("patch", &bytes) else { return };
    let [base, last] = &*STATES;
    let mut outs: Vec<Vec<u8>> = patch
        .manifest()
        .entries()
        .iter()
        .map(|entry| vec![0; if entry.tensor.name == "mask" { 40 } else { 800 }])
        .collect();
    let buffers = outs.iter_mut().map(Vec::as_mut_slice).collect();
    if apply_into(&patch, Some(&checkpoint(base)), None, buffers, &OPTIONS, &quiet).is_ok() {
        let mut expected = last.to_vec();
        expected.sort();
        outs.sort();
        assert!(outs == expected, "another state from damaged bytes");
    }
});
