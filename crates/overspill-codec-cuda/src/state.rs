//! State ids of words that lie on a device, without bringing them down.
//!
//! A state's id is made of the 128-bit XXH3 of its segments, and XXH3 can be taken in parallel: the kernel comes to the
//! eight sums that it keeps, and [`finished`] does the last step here. So the id is that of
//! [`overspill_tpde::state_id`], bit for bit, which is the slow twin.
#![expect(unsafe_code, reason = "launches kernels")]

use std::sync::{Arc, Mutex, PoisonError};

use overspill_codec::segments;
use overspill_device::cuda::{Arg, CudaDevice, Kernel, Launch as Shape};
use overspill_device::nvrtc::{Nvrtc, cache::KernelCache};
use overspill_device::{Device, DeviceRange, StreamRef, kernels};
use overspill_tpde::{Checkpoint, SegmentHash, StateId, hash_segment, state_id_of};

use crate::decoder::Result;

/// Threads of a block of the kernel: sixteen warps that sum, one that follows.
pub const STATE_THREADS: u32 = 17 * 32;
/// Bytes up to which XXH3 is another function; such segments are hashed here.
pub const SHORT_BYTES: usize = 240;
/// Sums that XXH3 keeps.
const LANES: usize = 8;
/// The words of XXH3's secret with which the sums are folded into the low and into the high half of the hash.
const FOLD_SECRETS: [[u64; LANES]; 2] = [
    [
        0x6dd4_de1c_ad21_f72c,
        0xa440_72db_9790_83e9,
        0xe679_cb1f_67b3_b7a4,
        0xd05a_8278_e5c0_cc4e,
        0x4608_b821_72ff_cc7d,
        0x9035_e08e_2443_f774,
        0x5228_3c4c_263a_81e6,
        0x65d0_88cb_00c3_91bb,
    ],
    [
        0xd9c9_7e9f_c831_59b4,
        0x3483_acc5_ea64_7378,
        0xfaff_a081_c5c3_ebd3,
        0xb751_dd0d_17eb_6313,
        0x2926_5516_d349_daf0,
        0x7d58_be16_2b9e_68d4,
        0x7ad1_b8f8_8ffc_a147,
        0x958f_3acb_45ce_31d0,
    ],
];

/// Hashes words on one device.
pub struct StateHasher {
    device: Arc<CudaDevice>,
    kernel: Kernel,
    /// The list of segments and their sums; grows, and is used by one at a time.
    scratch: Mutex<Option<DeviceRange>>,
}

/// A segment's bytes on the device.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Address of the first byte.
    pub addr: u64,
    /// How many there are.
    pub bytes: usize,
}

impl StateHasher {
    /// Compiles the kernel for a device, or takes it from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let module = device.build(nvrtc, &KernelCache::of_user(), &kernels::STATE)?;
        Ok(Self {
            device: Arc::clone(device),
            kernel: module.kernel("state_sums")?,
            scratch: Mutex::new(None),
        })
    }

    /// The id of a state whose tensors lie at `addrs`, in the order of [`Checkpoint::tensors`], as they are when
    /// `stream` has come past what it has been given. Waits.
    ///
    /// # Errors
    /// The device.
    ///
    /// # Safety
    /// Every address names device memory of its tensor's size that nobody writes until this returns.
    pub unsafe fn state_id(
        &self,
        stream: &StreamRef,
        checkpoint: &Checkpoint<'_>,
        addrs: &[u64],
    ) -> Result<StateId> {
        let spans = spans(checkpoint, addrs);
        // SAFETY: the caller's promise.
        let hashes = unsafe { self.hash(stream, &spans) }?;
        Ok(state_id_of(checkpoint, &hashes))
    }

    unsafe fn hash(&self, stream: &StreamRef, spans: &[Span]) -> Result<Vec<SegmentHash>> {
        let list = list(spans);
        let count = list.len() / 16;
        let mut sums = Vec::new();
        if count > 0 {
            let mut kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = list.len() + count * LANES * 8;
            let scratch = match kept.take() {
                Some(range) if range.bytes() >= bytes => range,
                _ => self.device.alloc_device(bytes)?,
            };
            self.device.write(&scratch.slice(0..list.len())?, &list)?;
            let made = scratch.slice(list.len()..bytes)?;
            let args = [Arg::U64(scratch.addr()), Arg::U64(made.addr())];
            let shape = Shape::linear(count as u32, STATE_THREADS);
            // SAFETY: the kernel's arguments; the words are the caller's promise, the scratch is ours.
            unsafe { self.kernel.launch(&**stream, shape, &args) }?;
            stream.synchronize()?;
            let read = self.device.read(&made)?;
            sums = read.as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word)).collect();
            *kept = Some(scratch);
        }
        let mut sums = sums.as_chunks::<LANES>().0.iter();
        let mut hashes = Vec::with_capacity(spans.len());
        for span in spans {
            if span.bytes > SHORT_BYTES {
                hashes.push(finished(sums.next().expect("sums of every long segment"), span.bytes));
                continue;
            }
            // SAFETY: the caller's promise.
            let range = unsafe { DeviceRange::from_raw(span.addr, span.bytes, Arc::new(())) };
            stream.synchronize()?;
            hashes.push(hash_segment(&self.device.read(&range)?));
        }
        Ok(hashes)
    }
}

/// The segments of a state whose tensors lie at `addrs`, tensors in order of name.
fn spans(checkpoint: &Checkpoint<'_>, addrs: &[u64]) -> Vec<Span> {
    let numbered: std::collections::HashMap<&str, u64> =
        checkpoint.tensors().iter().map(|tensor| tensor.name.as_str()).zip(addrs.iter().copied()).collect();
    let of_tensor = |tensor: &overspill_tpde::Tensor| {
        let (kind, addr) = (tensor.kind, numbered[tensor.name.as_str()]);
        segments(tensor.words()).map(move |(first_word, words)| Span {
            addr: addr + kind.bytes_of(first_word),
            bytes: kind.bytes_of(words as u64) as usize,
        })
    };
    checkpoint.sorted().flat_map(of_tensor).collect()
}

/// What the kernel is given: address and length of each segment that is not short.
pub fn list(spans: &[Span]) -> Vec<u8> {
    let long = spans.iter().filter(|span| span.bytes > SHORT_BYTES);
    long.flat_map(|span| [span.addr, span.bytes as u64]).flat_map(u64::to_le_bytes).collect()
}

/// The hash of a segment of `bytes` bytes whose sums these are.
pub fn finished(sums: &[u64; LANES], bytes: usize) -> SegmentHash {
    let length = bytes as u64;
    let starts = [length.wrapping_mul(0x9e37_79b1_85eb_ca87), !length.wrapping_mul(0xc2b2_ae3d_27d4_eb4f)];
    let fold = |half: usize| {
        let keyed: Vec<u64> = sums.iter().zip(FOLD_SECRETS[half]).map(|(sum, secret)| sum ^ secret).collect();
        let (pairs, _) = keyed.as_chunks::<2>();
        let folded = pairs.iter().map(|&[one, other]| {
            let product = u128::from(one) * u128::from(other);
            product as u64 ^ (product >> 64) as u64
        });
        let mut made = folded.fold(starts[half], u64::wrapping_add);
        made = (made ^ made >> 37).wrapping_mul(0x1656_6791_9e37_79f9);
        made ^ made >> 32
    };
    (u128::from(fold(1)) << 64 | u128::from(fold(0))).to_le_bytes()
}
