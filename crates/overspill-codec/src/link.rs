//! The link codec: 16-bit floats packed for a copy over a link, lossless, fast before small.
//!
//! For bytes that leave a device and come back within a step: nothing is stored, so the layout may change with any
//! version. This is the reference for `overspill-device/src/kernels/link.cu`.
//!
//! A chunk is 8192 words. Seven exponents in a row, or six in a row and exponent 0, have codes of 3 bits; code 7 is an
//! exception, whose exponent follows as a byte. Words are numbered as the kernel's threads hold them: thread t of 256
//! holds words 8 (t + 256 i) + j as its numbers 8 i + j, i < 4, j < 8. A payload, with 32 fields of 3 bits in three
//! 32-bit words a thread:
//!
//! 1. 8192 bytes in the words' order: sign and mantissa of bf16, the low byte of f16,
//! 2. codes: first, second and third words of all threads,
//! 3. f16 only: sign and the two upper mantissa bits, laid out like the codes,
//! 4. exponents of the exceptions, threads in order and in each its numbers, zeros up to a multiple of 16 bytes.
//!
//! Payloads start on 16 bytes, in any order. A **record** is two 32-bit words a chunk: the payload's start in units of
//! 16 bytes; exceptions | first exponent << 16 | mode << 24. Modes: 0 raw (the words as they are; all else would be
//! no smaller), 1 seven, 2 six and zero. Records and padding are all that can make it larger: 8 bytes a chunk and
//! up to 15 at the end.

use crate::CodecError;

/// Words of a chunk.
pub const LINK_CHUNK_WORDS: usize = 8192;
const THREADS: usize = 256;
const UNIT: usize = 16;

/// Which 16-bit float.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkFormat {
    /// bfloat16: 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// IEEE half precision: 5 and 10.
    F16,
}

/// Packed words.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkPacked {
    /// Payloads of all chunks.
    pub payload: Vec<u8>,
    /// A record a chunk.
    pub records: Vec<[u32; 2]>,
}

impl LinkFormat {
    fn shift(self) -> u32 {
        if self == LinkFormat::Bf16 { 7 } else { 10 }
    }

    fn exponent(self, word: u16) -> u32 {
        u32::from(word) >> self.shift() & if self == LinkFormat::Bf16 { 255 } else { 31 }
    }

    fn fixed_bytes(self) -> usize {
        LINK_CHUNK_WORDS + 12 * THREADS * if self == LinkFormat::Bf16 { 1 } else { 2 }
    }

    /// Most bytes that the payload of `words` words takes.
    pub fn payload_bound_bytes(self, words: usize) -> usize {
        (2 * words).next_multiple_of(UNIT)
    }
}

/// The meaning of a chunk's codes.
struct Codes {
    low: u32,
    zero: bool,
}

impl Codes {
    /// From the first word of every eight.
    fn choose(format: LinkFormat, chunk: &[u16]) -> Self {
        let mut counts = [0u32; 264];
        for (i, &word) in chunk.iter().enumerate() {
            if i % 8 == 0 {
                counts[format.exponent(word) as usize] += 1;
            }
        }
        let key = |low: usize| {
            let six: u32 = counts[low..low + 6].iter().sum();
            let (with_zero, seven) = (six + counts[0], six + counts[low + 6]);
            let zero = low > 0 && with_zero > seven;
            (if zero { with_zero } else { seven }) << 9 | (low as u32) << 1 | u32::from(zero)
        };
        let best = (0..256).map(key).max().unwrap_or_default();
        Codes { low: best >> 1 & 255, zero: best & 1 == 1 }
    }

    fn code(&self, exponent: u32) -> u32 {
        let code = exponent.wrapping_sub(self.low);
        match self.zero {
            true if exponent == 0 => 6,
            true if code < 6 => code,
            false if code < 7 => code,
            _ => 7,
        }
    }
}

/// The word's place in its chunk of a thread's number.
fn place(thread: usize, number: usize) -> usize {
    8 * (thread + THREADS * (number / 8)) + number % 8
}

fn put3(fields: &mut [u32; 3], number: usize, value: u32) {
    let wide = u64::from(value) << (3 * number % 32);
    fields[3 * number / 32] |= wide as u32;
    if wide >> 32 != 0 {
        fields[3 * number / 32 + 1] |= (wide >> 32) as u32;
    }
}

fn get3(fields: &[u32; 3], number: usize) -> u32 {
    let low = u64::from(fields[3 * number / 32]);
    let high = u64::from(fields.get(3 * number / 32 + 1).copied().unwrap_or_default());
    ((high << 32 | low) >> (3 * number % 32)) as u32 & 7
}

/// Pack little-endian words.
///
/// # Errors
/// An odd number of bytes, or more than 64 GiB.
pub fn link_encode(format: LinkFormat, bytes: &[u8]) -> Result<LinkPacked, CodecError> {
    let words = words_of(bytes)?;
    let mut packed = LinkPacked::default();
    for own in words.chunks(LINK_CHUNK_WORDS) {
        let start = u32::try_from(packed.payload.len() / UNIT);
        let start = start.map_err(|_| CodecError::Limit {
            what: "units of a payload",
            found: 1 << 32,
            limit: u32::MAX.into(),
        })?;
        let mut chunk = own.to_vec();
        chunk.resize(LINK_CHUNK_WORDS, 0);
        let codes = Codes::choose(format, &chunk);
        let (mut code_fields, mut top_fields) = ([[0u32; 3]; THREADS], [[0u32; 3]; THREADS]);
        let mut exceptions = Vec::new();
        for thread in 0..THREADS {
            for number in 0..32 {
                let at = place(thread, number);
                let word = chunk[at];
                let code = if at < own.len() { codes.code(format.exponent(word)) } else { 0 };
                put3(&mut code_fields[thread], number, code);
                put3(&mut top_fields[thread], number, u32::from(word) >> 13 & 4 | u32::from(word) >> 8 & 3);
                if code == 7 {
                    exceptions.push(format.exponent(word) as u8);
                }
            }
        }
        if format.fixed_bytes() + exceptions.len().next_multiple_of(UNIT) >= 2 * own.len() {
            packed.records.push([start, 0]);
            packed.payload.extend(own.iter().flat_map(|word| word.to_le_bytes()));
            packed.payload.resize(packed.payload.len().next_multiple_of(UNIT), 0);
            continue;
        }
        let mode = if codes.zero { 2 } else { 1 };
        packed.records.push([start, exceptions.len() as u32 | codes.low << 16 | mode << 24]);
        packed.payload.extend(chunk.iter().map(|&word| match format {
            LinkFormat::Bf16 => (word & 127) as u8 | (word >> 8 & 128) as u8,
            LinkFormat::F16 => word as u8,
        }));
        let mut fields = |fields: &[[u32; 3]; THREADS]| {
            for i in 0..3 {
                packed.payload.extend(fields.iter().flat_map(|own| own[i].to_le_bytes()));
            }
        };
        fields(&code_fields);
        if format == LinkFormat::F16 {
            fields(&top_fields);
        }
        packed.payload.extend_from_slice(&exceptions);
        packed.payload.resize(packed.payload.len().next_multiple_of(UNIT), 0);
    }
    Ok(packed)
}

/// Unpack into `out`, as long as what was packed.
///
/// # Errors
/// Records or payloads that no encoder writes.
pub fn link_decode(format: LinkFormat, packed: &LinkPacked, out: &mut [u8]) -> Result<(), CodecError> {
    let bad = CodecError::malformed("link payload", "does not fit its record");
    if !out.len().is_multiple_of(2) || packed.records.len() != out.len().div_ceil(2 * LINK_CHUNK_WORDS) {
        return Err(CodecError::malformed("link records", "not one a chunk"));
    }
    for (own, &[start, meta]) in out.chunks_mut(2 * LINK_CHUNK_WORDS).zip(&packed.records) {
        let (count, low, mode) = ((meta & 0xffff) as usize, meta >> 16 & 255, meta >> 24);
        let rest = packed.payload.get(start as usize * UNIT..).ok_or(bad.clone())?;
        if mode == 0 {
            own.copy_from_slice(rest.get(..own.len()).ok_or(bad.clone())?);
            continue;
        }
        let fixed = rest.get(..format.fixed_bytes() + count).filter(|_| mode <= 2).ok_or(bad.clone())?;
        let (bytes, fields) = fixed.split_at(LINK_CHUNK_WORDS);
        let (fields, exceptions) = fields.split_at(format.fixed_bytes() - LINK_CHUNK_WORDS);
        let field = |group: usize, thread: usize| -> [u32; 3] {
            std::array::from_fn(|i| {
                let at = 4 * (thread + THREADS * (3 * group + i));
                u32::from_le_bytes(std::array::from_fn(|b| fields[at + b]))
            })
        };
        let mut exceptions = exceptions.iter();
        for thread in 0..THREADS {
            let code_fields = field(0, thread);
            let top_fields = if format == LinkFormat::F16 { field(1, thread) } else { [0; 3] };
            for number in 0..32 {
                let at = place(thread, number);
                let exponent = match get3(&code_fields, number) {
                    7 => u32::from(*exceptions.next().ok_or(bad.clone())?),
                    6 if mode == 2 => 0,
                    code => low + code,
                };
                let (byte, top) = (u32::from(bytes[at]), get3(&top_fields, number));
                let word = match format {
                    LinkFormat::Bf16 => (byte & 128) << 8 | exponent << 7 | byte & 127,
                    LinkFormat::F16 => (top & 4) << 13 | exponent << 10 | (top & 3) << 8 | byte,
                };
                if let Some(to) = own.get_mut(2 * at..2 * at + 2) {
                    to.copy_from_slice(&(word as u16).to_le_bytes());
                }
            }
        }
        if exceptions.next().is_some() {
            return Err(bad);
        }
    }
    Ok(())
}

fn words_of(bytes: &[u8]) -> Result<Vec<u16>, CodecError> {
    let (words, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(CodecError::malformed("words", "an odd number of bytes"));
    }
    Ok(words.iter().map(|&word| u16::from_le_bytes(word)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(rng: &mut fastrand::Rng, count: usize, spread: u32) -> Vec<u8> {
        let word = |rng: &mut fastrand::Rng| {
            let low = (0..spread).take_while(|_| rng.bool()).count() as u16;
            (rng.u16(..) & 0x807f) | (120 - low.min(120)) << 7
        };
        (0..count).flat_map(|_| word(rng).to_le_bytes()).collect()
    }

    #[test]
    fn words_come_back_and_shrink_or_stay() {
        println!("seed 5");
        let mut rng = fastrand::Rng::with_seed(5);
        for format in [LinkFormat::Bf16, LinkFormat::F16] {
            for (count, spread) in [(0, 1), (1, 1), (7, 3), (8191, 8), (8192, 3), (20_000, 30), (40_000, 200)]
            {
                let bytes = words(&mut rng, count, spread);
                let packed = link_encode(format, &bytes).unwrap();
                assert!(packed.payload.len() <= format.payload_bound_bytes(count));
                let mut back = vec![0xaa; bytes.len()];
                link_decode(format, &packed, &mut back).unwrap();
                assert!(back == bytes, "{format:?}, {count} words");
            }
        }
        let bytes = words(&mut rng, 1 << 20, 8);
        let packed = link_encode(LinkFormat::Bf16, &bytes).unwrap();
        assert!(packed.payload.len() * 10 < bytes.len() * 8, "{} of {}", packed.payload.len(), bytes.len());
        let noise: Vec<u8> = (0..100_002).map(|_| rng.u8(..)).collect();
        let packed = link_encode(LinkFormat::Bf16, &noise).unwrap();
        assert!(packed.payload.len() + 8 * packed.records.len() <= noise.len() + noise.len() / 100);
    }

    #[test]
    fn damaged_records_are_errors() {
        println!("seed 6");
        let mut rng = fastrand::Rng::with_seed(6);
        let bytes = words(&mut rng, 20_000, 8);
        let packed = link_encode(LinkFormat::Bf16, &bytes).unwrap();
        for _ in 0..2000 {
            let mut bad = packed.clone();
            let record = rng.usize(..bad.records.len());
            bad.records[record][rng.usize(..2)] ^= 1 << rng.u32(..32);
            bad.payload.truncate(rng.usize(..=bad.payload.len()));
            let _ = link_decode(LinkFormat::Bf16, &bad, &mut vec![0; bytes.len()]);
        }
        assert!(link_encode(LinkFormat::F16, &[1]).is_err());
    }
}
