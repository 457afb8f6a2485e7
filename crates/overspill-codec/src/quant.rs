//! Quantized bases: GGUF's Q4_0, Q4_1 and Q8_0 blocks, what they predict, and how residuals against them are coded.
//!
//! **Dequantization**, defined to the bit. d and m are f16, widened to f32 exactly. Q4_0 and Q8_0: d * q (q less 8
//! in Q4_0), exact in f32. Q4_1: d * q, exact, plus m, rounded once to the nearest f32, ties to even; fusing the two
//! gives the same bits. A NaN becomes 0x7fc00000. Then, for F16 and BF16, rounded to nearest, ties to even.
//! In the 4-bit layouts byte j of a block holds weight j in its low half and weight j + 16 in its high half.
//!
//! **Residuals.** A word's key is 4 c + the top two mantissa bits of d (as f16), with c = 0 where the prediction's
//! f32 exponent field is below d's, else 1 + their difference, at most 8. Where c > 0 the residual is the step
//! from prediction to final word. Where c = 0 the final word lies around zero, so the residual is
//! rotl1(final) - rotl1(|d| in the dtype): magnitude above the sign bit, so that both signs stay near.

use crate::dense::Context;
use crate::half::{f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::words::{OrderMap, Word};
use crate::{CodecError, Dtype, QuantLayout};

const BLOCK: usize = QuantLayout::BLOCK_WORDS;

/// The integer levels of a block, its scale (as stored) and its offset.
fn unpack(layout: QuantLayout, block: &[u8]) -> ([i32; BLOCK], u16, f32) {
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let mut levels = [0; BLOCK];
    let (start, zero, offset) = match layout {
        QuantLayout::Q4_0 => (2, 8, 0.0),
        QuantLayout::Q4_1 => (4, 0, f16_to_f32(half(2))),
        QuantLayout::Q8_0 => {
            for (level, &byte) in levels.iter_mut().zip(&block[2..]) {
                *level = i32::from(byte as i8);
            }
            return (levels, half(0), 0.0);
        }
    };
    for (j, &byte) in block[start..].iter().enumerate() {
        levels[j] = i32::from(byte & 15) - zero;
        levels[j + BLOCK / 2] = i32::from(byte >> 4) - zero;
    }
    (levels, half(0), offset)
}

fn round_to(dtype: Dtype, value: f32) -> u64 {
    match dtype {
        Dtype::Bf16 => f32_to_bf16(value).into(),
        Dtype::F16 => f32_to_f16(value).into(),
        _ => value.to_bits().into(),
    }
}

/// Whether residuals of this dtype against quantized blocks are defined.
pub(crate) fn check_dtype(dtype: Dtype) -> Result<(), CodecError> {
    match dtype {
        Dtype::Bf16 | Dtype::F16 | Dtype::F32 => Ok(()),
        _ => Err(CodecError::Base { why: "a quantized base needs BF16, F16 or F32 weights" }),
    }
}

/// What quantized blocks say about the words they stand for.
pub(crate) struct Prediction<W> {
    /// Predicted words, little endian.
    pub(crate) words: Vec<u8>,
    /// Key of each word.
    pub(crate) keys: Vec<u8>,
    /// |d| of each block, rotated left by one.
    pivots: Vec<W>,
}

impl<W: Word> Prediction<W> {
    /// Dequantize whole blocks for words of `dtype`, one of those that [`check_dtype`] lets through.
    pub(crate) fn new(layout: QuantLayout, blocks: &[u8], dtype: Dtype) -> Self {
        let count = blocks.len() / layout.block_bytes();
        let mut prediction = Prediction {
            words: vec![0; count * BLOCK * W::BYTES],
            keys: Vec::with_capacity(count * BLOCK),
            pivots: Vec::with_capacity(count),
        };
        let mut words = prediction.words.chunks_exact_mut(W::BYTES);
        for block in blocks.chunks_exact(layout.block_bytes()) {
            let (levels, stored, offset) = unpack(layout, block);
            let scale = f16_to_f32(stored);
            let scale_exponent = (scale.to_bits() >> 23 & 0xff) as i32;
            let mantissa = (stored >> 8 & 3) as u8;
            prediction.pivots.push(W::from_u64(round_to(dtype, scale.abs())).rotl1());
            for (&level, word) in levels.iter().zip(&mut words) {
                let mut value = scale * level as f32;
                if layout == QuantLayout::Q4_1 {
                    value += offset;
                }
                if value.is_nan() {
                    value = f32::from_bits(0x7fc0_0000);
                }
                W::from_u64(round_to(dtype, value)).store(word);
                let above = (value.to_bits() >> 23 & 0xff) as i32 - scale_exponent;
                prediction.keys.push((above + 1).clamp(0, 8) as u8 * 4 + mantissa);
            }
        }
        prediction
    }
}

/// Dense steps against a prediction.
pub(crate) struct QuantContext<'a, W> {
    pub(crate) prediction: &'a Prediction<W>,
    pub(crate) class_of_key: &'a [u8; 256],
}

const ORDER: OrderMap = OrderMap { is_float: true };

impl<W: Word> Prediction<W> {
    #[inline(always)]
    fn is_near_zero(&self, position: usize) -> bool {
        self.keys[position] < 4
    }

    /// The residual of a final word.
    #[inline(always)]
    pub(crate) fn residual(&self, position: usize, base: W, new: W) -> W {
        if self.is_near_zero(position) {
            new.rotl1().sub(self.pivots[position / BLOCK])
        } else {
            ORDER.step(base, new)
        }
    }
}

impl<W: Word> Context<W> for QuantContext<'_, W> {
    // Around zero the residual is that to another word.
    const STILL_IS_BASE: bool = false;

    #[inline(always)]
    fn class(&self, position: usize, _base: W) -> usize {
        self.class_of_key[usize::from(self.prediction.keys[position])].into()
    }

    #[inline(always)]
    fn step(&self, position: usize, base: W, new: W) -> W {
        self.prediction.residual(position, base, new)
    }

    #[inline(always)]
    fn word(&self, position: usize, base: W, step: W) -> W {
        if self.prediction.is_near_zero(position) {
            step.add(self.prediction.pivots[position / BLOCK]).rotr1()
        } else {
            ORDER.apply(base, step)
        }
    }
}

/// The words that quantized blocks stand for, as `dtype` (BF16, F16 or F32), by the rule at the top of this file.
///
/// # Errors
/// Another dtype, or a length that is not whole blocks.
pub fn dequantize(layout: QuantLayout, blocks: &[u8], dtype: Dtype) -> Result<Vec<u8>, CodecError> {
    check_dtype(dtype)?;
    if !blocks.len().is_multiple_of(layout.block_bytes()) {
        return Err(CodecError::Base { why: "not whole blocks" });
    }
    Ok(match dtype.word_bytes() {
        2 => Prediction::<u16>::new(layout, blocks, dtype).words,
        _ => Prediction::<u32>::new(layout, blocks, dtype).words,
    })
}

/// Quantize weights (little-endian BF16, F16 or F32, a multiple of 32) to blocks, as llama.cpp's reference
/// quantizers do. For making a base; nothing depends on how good it is.
///
/// # Errors
/// Another dtype, or a length that is not a multiple of 32 weights.
pub fn quantize(layout: QuantLayout, weights: &[u8], dtype: Dtype) -> Result<Vec<u8>, CodecError> {
    check_dtype(dtype)?;
    if !weights.len().is_multiple_of(BLOCK * dtype.word_bytes()) {
        return Err(CodecError::Base { why: "a quantized base needs a multiple of 32 weights" });
    }
    let mut blocks = Vec::with_capacity(weights.len() / (BLOCK * dtype.word_bytes()) * layout.block_bytes());
    for group in weights.chunks_exact(BLOCK * dtype.word_bytes()) {
        let mut values = [0f32; BLOCK];
        for (value, word) in values.iter_mut().zip(group.chunks_exact(dtype.word_bytes())) {
            *value = match dtype {
                Dtype::Bf16 => f32::from_bits(u32::from(u16::load(word)) << 16),
                Dtype::F16 => f16_to_f32(u16::load(word)),
                _ => f32::from_bits(u32::load(word)),
            };
        }
        quantize_block(layout, &values, &mut blocks);
    }
    Ok(blocks)
}

fn quantize_block(layout: QuantLayout, values: &[f32; BLOCK], out: &mut Vec<u8>) {
    let largest = values.iter().fold(0f32, |best, &v| if v.abs() > best.abs() { v } else { best });
    let inverse = |scale: f32| if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut put = |value: f32| out.extend_from_slice(&f32_to_f16(value).to_le_bytes());
    let level: Box<dyn Fn(f32) -> u8> = match layout {
        QuantLayout::Q4_0 => {
            put(largest / -8.0);
            let id = inverse(largest / -8.0);
            Box::new(move |v| ((v * id + 8.5) as u8).min(15))
        }
        QuantLayout::Q4_1 => {
            let low = values.iter().copied().fold(f32::INFINITY, f32::min);
            let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            put((high - low) / 15.0);
            put(low);
            let id = inverse((high - low) / 15.0);
            Box::new(move |v| (((v - low) * id + 0.5) as u8).min(15))
        }
        QuantLayout::Q8_0 => {
            put(largest.abs() / 127.0);
            let id = inverse(largest.abs() / 127.0);
            Box::new(move |v| (v * id).round() as i8 as u8)
        }
    };
    match layout {
        QuantLayout::Q8_0 => out.extend(values.iter().map(|&v| level(v))),
        _ => out.extend((0..BLOCK / 2).map(|j| level(values[j]) | level(values[j + BLOCK / 2]) << 4)),
    }
}
