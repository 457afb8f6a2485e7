//! Mode W: final words without a base, as planes of bytes.
//!
//! A float word is rotated left by one, which puts the exponent on top and the sign at the bottom; plane 0 is the
//! most significant byte of every word, and so on. A plane that has a table in the head is entropy-coded (varint
//! bytes, 32 lane states that decoding must bring back to 2^16, word stream); the others are stored as they are.
//! Payload after the mode byte: the planes in order.

use crate::CodecError;
use crate::bits::{BitReader, BitWriter, put_varint, take, take_varint};
use crate::rans::{Decoder, MAX_LANES, SymbolTable, put_coded};
use crate::simd;
use crate::tables::{Frequencies, MAX_SYMBOLS, entropy_bits};
use crate::words::Word;

/// Per plane its table, `None` where it is stored raw.
pub(crate) type PlaneTables = Vec<Option<SymbolTable>>;

/// Plane tables as they are written, and the bits that a word costs under them.
pub(crate) struct PlanePlan {
    pub(crate) frequencies: Vec<Option<Frequencies>>,
    pub(crate) bits_per_word: f64,
}

/// Words in every [`SAMPLE_STRIDE`]-th run of this many are looked at to rule planes out.
const SAMPLE_WORDS: usize = 1024;
const SAMPLE_STRIDE: usize = 16;
/// A plane is entropy-coded if that takes less than this of its bytes.
const WORTHWHILE: f64 = 0.98;

/// Choose tables for `words`.
pub(crate) fn plan<W: Word>(words: &[u8], is_float: bool) -> PlanePlan {
    let runs = words.chunks(SAMPLE_WORDS * W::BYTES);
    let count = |plane: usize, is_sample: bool| {
        let stride = if is_sample { SAMPLE_STRIDE } else { 1 };
        count_bytes::<W>(runs.clone().step_by(stride), plane, is_float)
    };
    plan_counted(W::BYTES, words.len() / W::BYTES, count)
}

/// Choose tables for `total` words whose planes' bytes `count` counts, all of them or those of the sample.
pub(crate) fn plan_counted(
    planes: usize,
    total: usize,
    count: impl Fn(usize, bool) -> [u64; MAX_SYMBOLS],
) -> PlanePlan {
    let mut plan = PlanePlan { frequencies: Vec::new(), bits_per_word: 0.0 };
    for plane in 0..planes {
        let fitted = if entropy_bits(&count(plane, true)) < WORTHWHILE * 8.0 {
            let (frequencies, bits) = Frequencies::fit(&count(plane, false));
            Some((frequencies, bits / total as f64)).filter(|(_, bits)| *bits < WORTHWHILE * 8.0)
        } else {
            None
        };
        plan.bits_per_word += fitted.as_ref().map_or(8.0, |(_, bits)| *bits);
        plan.frequencies.push(fitted.map(|(frequencies, _)| frequencies));
    }
    plan
}

/// How often each byte occurs in a plane of some runs of words.
fn count_bytes<'a, W: Word>(
    runs: impl Iterator<Item = &'a [u8]>,
    plane: usize,
    is_float: bool,
) -> [u64; 256] {
    let shift = plane_shift::<W>(plane);
    // Eight tables, so that equal neighbours do not wait for each other.
    let mut tables = [[0u32; MAX_SYMBOLS]; 8];
    let mut bytes = [0; SAMPLE_WORDS];
    for run in runs {
        let bytes = &mut bytes[..run.len() / W::BYTES];
        simd::split_plane::<W>(run, is_float, shift, bytes);
        let (eights, rest) = bytes.as_chunks::<8>();
        for &byte in rest {
            tables[0][usize::from(byte)] += 1;
        }
        for eight in eights {
            for (&byte, table) in eight.iter().zip(&mut tables) {
                table[usize::from(byte)] += 1;
            }
        }
    }
    std::array::from_fn(|byte| tables.iter().map(|table| u64::from(table[byte])).sum())
}

/// Where a plane's byte lies in a rotated word.
fn plane_shift<W: Word>(plane: usize) -> u32 {
    W::BITS - 8 - 8 * plane as u32
}

/// Write the head's plane tables: per plane bit 1 and a frequency table, or bit 0.
pub(crate) fn write_tables(out: &mut BitWriter, frequencies: &[Option<Frequencies>]) {
    for table in frequencies {
        out.put(table.is_some().into(), 1);
        if let Some(table) = table {
            table.write(out);
        }
    }
}

/// Inverse of [`write_tables`].
pub(crate) fn read_tables(bits: &mut BitReader<'_>, planes: usize) -> Result<PlaneTables, CodecError> {
    let read = |bits: &mut BitReader<'_>| match bits.get(1)? {
        1 => Ok(Some(Frequencies::read(bits, MAX_SYMBOLS)?.table())),
        _ => Ok(None),
    };
    (0..planes).map(|_| read(bits)).collect()
}

/// The byte at `shift` of a word, rotated if it is a float's. Only the lowest byte of a rotated word wraps around.
#[inline(always)]
fn plane_byte<W: Word>(word: W, is_float: bool, shift: u32) -> u8 {
    match (is_float, shift) {
        (false, _) => word.byte(shift),
        (true, 0) => word.rotl1().byte(0),
        (true, _) => word.byte(shift - 1),
    }
}

/// The bytes at `shift` of all words.
#[inline(always)]
pub(crate) fn split_plane<W: Word>(words: &[u8], is_float: bool, shift: u32, plane: &mut [u8]) {
    for (byte, word) in plane.iter_mut().zip(words.chunks_exact(W::BYTES)) {
        *byte = plane_byte::<W>(W::load(word), is_float, shift);
    }
}

/// Buffers of an encoder, kept from chunk to chunk.
#[derive(Default)]
pub(crate) struct Scratch {
    plane: Vec<u8>,
    words: Vec<u16>,
}

/// Append the payload of one chunk. Every byte that occurs must have a frequency in its plane's table.
pub(crate) fn encode<W: Word>(
    words: &[u8],
    tables: &PlaneTables,
    is_float: bool,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let Scratch { plane, words: room } = scratch;
    let count = words.len() / W::BYTES;
    plane.resize(count, 0);
    for (index, table) in tables.iter().enumerate() {
        let shift = plane_shift::<W>(index);
        match table {
            None => {
                let start = out.len();
                out.resize(start + count, 0);
                simd::split_plane::<W>(words, is_float, shift, &mut out[start..]);
            }
            Some(table) => {
                simd::split_plane::<W>(words, is_float, shift, plane);
                let (states, first) = simd::encode_bytes(plane, table, room);
                let coded = &room[first..];
                put_varint(out, (4 * states.len() + 2 * coded.len()) as u64);
                put_coded(&states, coded.iter(), out);
            }
        }
    }
}

/// Words whose planes are decoded before they are put together: whole groups of lanes, and near in the caches.
const BLOCK_WORDS: usize = 2048;

/// A plane while it is decoded.
enum Plane<'a> {
    Stored(&'a [u8]),
    Coded(Decoder<'a>, &'a SymbolTable),
}

/// Decode a payload (without its mode byte) into `words`, all of which are written.
pub(crate) fn decode<W: Word>(
    mut body: &[u8],
    tables: &PlaneTables,
    is_float: bool,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let mut planes = Vec::with_capacity(tables.len());
    for table in tables {
        planes.push(match table {
            None => Plane::Stored(take(&mut body, (words.len() / W::BYTES) as u64, "planes chunk")?),
            Some(table) => {
                let bytes = take_varint(&mut body)?;
                Plane::Coded(Decoder::new(take(&mut body, bytes, "planes chunk")?, MAX_LANES)?, table)
            }
        });
    }
    if !body.is_empty() {
        return Err(CodecError::malformed("planes chunk", "bytes left over"));
    }
    let mut decoded = vec![[0; BLOCK_WORDS]; planes.len()];
    for block in words.chunks_mut(BLOCK_WORDS * W::BYTES) {
        let count = block.len() / W::BYTES;
        let mut parts: [&[u8]; 8] = [&[]; 8];
        for ((plane, buffer), part) in planes.iter_mut().zip(&mut decoded).zip(&mut parts) {
            *part = match plane {
                Plane::Stored(bytes) => {
                    let (front, rest) = bytes.split_at(count);
                    *bytes = rest;
                    front
                }
                Plane::Coded(decoder, table) => {
                    simd::decode_next(decoder, table, &mut buffer[..count])?;
                    &buffer[..count]
                }
            };
        }
        join::<W>(&parts[..planes.len()], is_float, block);
    }
    for plane in &planes {
        if let Plane::Coded(decoder, _) = plane {
            decoder.finish()?;
        }
    }
    Ok(())
}

/// Put planes, each as long as there are words, back together.
fn join<W: Word>(planes: &[&[u8]], is_float: bool, words: &mut [u8]) {
    let store = |word: &mut [u8], value: u64| {
        let value = W::from_u64(value);
        if is_float { value.rotr1() } else { value }.store(word);
    };
    if let [high, low] = planes {
        for ((word, &high), &low) in words.chunks_exact_mut(W::BYTES).zip(*high).zip(*low) {
            store(word, u64::from(high) << 8 | u64::from(low));
        }
        return;
    }
    for (i, word) in words.chunks_exact_mut(W::BYTES).enumerate() {
        store(word, planes.iter().fold(0, |value, plane| value << 8 | u64::from(plane[i])));
    }
}
