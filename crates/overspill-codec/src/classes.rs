//! Classes of words by their base's exponent, and the sparse and dense tables that a head holds for them.
//!
//! The **key** of a word is its base's exponent field (of F64 the top 8 of 11 bits), 0 for integers and in absolute
//! patches. Classes cut the keys 0..=255 into contiguous ranges, in ascending order.

use crate::CodecError;
use crate::bits::{BitReader, BitWriter};
use crate::gap;
use crate::rans::{PROB_BITS, SymbolTable};
use crate::tables::{Frequencies, get_exp_golomb, get_signed, put_exp_golomb, put_signed};
use crate::values::magnitude_alphabet;

/// Most classes in a table.
pub(crate) const MAX_CLASSES: usize = 32;

/// Where the key lies in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyMap {
    pub(crate) shift: u32,
    pub(crate) mask: u8,
}

impl KeyMap {
    /// The key of words of `dtype`; the constant 0 where words are not compared with a base.
    pub(crate) fn new(dtype: crate::Dtype, conditioned: bool) -> Self {
        match dtype.float_layout() {
            Some(layout) if conditioned => {
                let dropped = layout.exponent_bits.saturating_sub(8);
                KeyMap {
                    shift: layout.mantissa_bits + dropped,
                    mask: ((1u32 << (layout.exponent_bits - dropped)) - 1) as u8,
                }
            }
            _ => KeyMap { shift: 0, mask: 0 },
        }
    }

    #[inline(always)]
    pub(crate) fn key<W: crate::words::Word>(self, word: W) -> u8 {
        word.byte(self.shift) & self.mask
    }
}

/// How the words of a class are coded in a sparse chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClassKind {
    /// None of them changes.
    Still,
    /// A symbol for every word.
    Dense,
    /// Gaps between the changed ones, geometric at this rate.
    Gaps(u32),
    /// Gaps between the changed ones, by a table of their own.
    Clustered,
    /// Whether each changed, of mode F: how many of 4096 slots are a change's.
    Flags(u32),
}

/// One class of a sparse table.
#[derive(Debug)]
pub(crate) struct Class {
    pub(crate) low: u8,
    pub(crate) high: u8,
    pub(crate) kind: ClassKind,
    /// Symbols of the values; `None` where every magnitude is 1.
    pub(crate) values: Option<SymbolTable>,
    /// Symbols of the gaps of a clustered class.
    pub(crate) gaps: Option<SymbolTable>,
}

/// What a class is written as.
pub(crate) struct ClassPlan {
    pub(crate) high: u8,
    pub(crate) kind: ClassKind,
    /// `None` where every magnitude is 1.
    pub(crate) values: Option<Frequencies>,
    /// For a clustered class.
    pub(crate) gaps: Option<Frequencies>,
}

/// Write the class ranges: number of classes - 1 (exp-Golomb 3), then for all but the last the keys up to and
/// including its end, less 1 (exp-Golomb 6 for the first, 0 for the others). `highs` are the last keys.
fn write_ranges(out: &mut BitWriter, highs: impl ExactSizeIterator<Item = u8>) {
    let count = highs.len();
    put_exp_golomb(out, count as u64 - 1, 3);
    let mut low = 0u64;
    for (i, high) in highs.take(count - 1).enumerate() {
        put_exp_golomb(out, u64::from(high) - low, if i == 0 { 6 } else { 0 });
        low = u64::from(high) + 1;
    }
}

fn read_ranges(bits: &mut BitReader<'_>) -> Result<Vec<(u8, u8)>, CodecError> {
    let bad = CodecError::malformed("class ranges", "more classes than keys");
    let count = get_exp_golomb(bits, 3)? as usize + 1;
    if count > MAX_CLASSES {
        return Err(bad);
    }
    let (mut ranges, mut low) = (Vec::with_capacity(count), 0u64);
    for i in 0..count - 1 {
        let high = low + get_exp_golomb(bits, if i == 0 { 6 } else { 0 })?;
        if high >= 255 {
            return Err(bad);
        }
        ranges.push((low as u8, high as u8));
        low = high + 1;
    }
    ranges.push((low as u8, 255));
    Ok(ranges)
}

/// Write a sparse class table. Per class: bit 1 and the signed difference (exp-Golomb 1) of its rate to 4 above the
/// previous coded rate (at first 8); or bit 0 and 2 bits: 0 still, 1 dense, 2 clustered and the frequency table
/// of its gaps, 3 flags and how many of 4096 slots are a change's (12 bits). Then, unless still, bit 1 if every magnitude is 1, else bit 0 and a frequency table.
pub(crate) fn write_sparse(out: &mut BitWriter, plans: &[ClassPlan]) {
    write_ranges(out, plans.iter().map(|plan| plan.high));
    let mut expected = 8i64;
    for ClassPlan { kind, values, gaps, .. } in plans {
        match *kind {
            ClassKind::Gaps(rate) => {
                out.put(1, 1);
                put_signed(out, i64::from(rate) - expected, 1);
                expected = i64::from(rate) + 4;
            }
            ClassKind::Still => {
                out.put(0, 3);
                continue;
            }
            ClassKind::Dense => out.put(0b010, 3),
            ClassKind::Clustered => {
                out.put(0b100, 3);
                gaps.as_ref().expect("a clustered class has a table of gaps").write(out);
            }
            ClassKind::Flags(frequency) => {
                out.put(0b110, 3);
                out.put(frequency.into(), PROB_BITS);
            }
        }
        out.put(u64::from(values.is_none()), 1);
        if let Some(values) = values {
            values.write(out);
        }
    }
}

/// Inverse of [`write_sparse`]; `alphabet` is how many value symbols the words can have.
pub(crate) fn read_sparse(bits: &mut BitReader<'_>, alphabet: usize) -> Result<Vec<Class>, CodecError> {
    let mut expected = 8i64;
    let mut classes = Vec::new();
    for (low, high) in read_ranges(bits)? {
        let mut gaps = None;
        let kind = if bits.get(1)? == 1 {
            let rate = expected + get_signed(bits, 1)?;
            if !(i64::from(gap::RATE_MIN)..=i64::from(gap::RATE_MAX)).contains(&rate) {
                return Err(CodecError::malformed("class table", "rate out of range"));
            }
            expected = rate + 4;
            ClassKind::Gaps(rate as u32)
        } else {
            match bits.get(2)? {
                0 => ClassKind::Still,
                1 => ClassKind::Dense,
                2 => {
                    gaps = Some(Frequencies::read(bits, magnitude_alphabet::<u32>())?.table());
                    ClassKind::Clustered
                }
                _ => match bits.get(PROB_BITS)? {
                    0 => return Err(CodecError::malformed("class table", "flags of no change")),
                    frequency => ClassKind::Flags(frequency as u32),
                },
            }
        };
        let values = if kind == ClassKind::Still || bits.get(1)? == 1 {
            None
        } else {
            Some(Frequencies::read(bits, alphabet)?.table())
        };
        if kind == ClassKind::Dense && values.is_none() {
            return Err(CodecError::malformed("class table", "a dense class without values"));
        }
        classes.push(Class { low, high, kind, values, gaps });
    }
    Ok(classes)
}

/// One class of a dense table: a symbol for every word.
#[derive(Debug)]
pub(crate) struct DenseClass {
    pub(crate) high: u8,
    pub(crate) values: SymbolTable,
}

/// Write a dense table: the class ranges and a frequency table for each.
pub(crate) fn write_dense(out: &mut BitWriter, plans: &[(u8, Frequencies)]) {
    write_ranges(out, plans.iter().map(|plan| plan.0));
    for (_, values) in plans {
        values.write(out);
    }
}

/// Inverse of [`write_dense`].
pub(crate) fn read_dense(bits: &mut BitReader<'_>, alphabet: usize) -> Result<Vec<DenseClass>, CodecError> {
    let ranges = read_ranges(bits)?;
    ranges
        .into_iter()
        .map(|(_, high)| Ok(DenseClass { high, values: Frequencies::read(bits, alphabet)?.table() }))
        .collect()
}
