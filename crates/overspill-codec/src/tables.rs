//! Frequency tables: from counts, and to and from the bits of a head.
//!
//! A table is written at the precision (a power of two) that makes table and data together cheapest: a class of
//! thirty events is worth four bits a probability, one of a million is worth twelve.
//!
//! Bits: precision b (4 bits, 0 to 12); first symbol (exp-Golomb 1); symbols after the first up to the last
//! (exp-Golomb 1); order g (3 bits); then the frequency of each symbol but the last (exp-Golomb g). The last is
//! what is missing to 2^b and is not 0. All are multiplied by 2^(12 - b).

use crate::CodecError;
use crate::bits::{BitReader, BitWriter};
use crate::rans::{PROB_BITS, SymbolTable};

/// Most symbols in an alphabet.
pub(crate) const MAX_SYMBOLS: usize = 256;

/// Frequencies at some precision, as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frequencies {
    precision: u32,
    first: usize,
    values: Vec<u32>,
}

impl Frequencies {
    /// The cheapest frequencies for `counts` (not all zero), and the bits that table and data cost together.
    pub(crate) fn fit(counts: &[u64]) -> (Self, f64) {
        let first = counts.iter().position(|&c| c > 0).expect("a count");
        let last = counts.iter().rposition(|&c| c > 0).expect("a count");
        let counts = &counts[first..=last];
        let used = counts.iter().filter(|&&c| c > 0).count() as u32;
        // Beyond eight times the events nothing is gained, and little below a 32nd of that.
        let total: u64 = counts.iter().sum();
        let fewest = used.next_power_of_two().ilog2();
        let highest = (total.ilog2() + 3).min(PROB_BITS).max(fewest);
        let lowest = highest.saturating_sub(5).max(fewest);
        let mut best: Option<(Self, f64)> = None;
        for precision in lowest..=highest {
            let candidate = Frequencies { precision, first, values: scale(counts, 1 << precision) };
            let bits = candidate.order().1 as f64 + candidate.data_bits(counts);
            if best.as_ref().is_none_or(|(_, least)| bits < *least) {
                best = Some((candidate, bits));
            }
            if used == 1 {
                break;
            }
        }
        best.expect("some precision holds every symbol")
    }

    fn data_bits(&self, counts: &[u64]) -> f64 {
        let bits = |(&count, &f): (&u64, &u32)| {
            if count == 0 { 0.0 } else { count as f64 * (f64::from(self.precision) - f64::from(f).log2()) }
        };
        counts.iter().zip(&self.values).map(bits).sum()
    }

    /// The cheapest exp-Golomb order and the bits of the whole table under it.
    fn order(&self) -> (u32, u64) {
        let head =
            4 + exp_golomb_bits(self.first as u64, 1) + exp_golomb_bits(self.values.len() as u64 - 1, 1) + 3;
        let body = |g: u32| {
            let values = &self.values[..self.values.len() - 1];
            values.iter().map(|&f| exp_golomb_bits(u64::from(f), g)).sum::<u64>()
        };
        (0..8).map(|g| (g, head + body(g))).min_by_key(|&(_, bits)| bits).expect("eight orders")
    }

    pub(crate) fn write(&self, out: &mut BitWriter) {
        let (g, _) = self.order();
        out.put(u64::from(self.precision), 4);
        put_exp_golomb(out, self.first as u64, 1);
        put_exp_golomb(out, self.values.len() as u64 - 1, 1);
        out.put(u64::from(g), 3);
        for &f in &self.values[..self.values.len() - 1] {
            put_exp_golomb(out, u64::from(f), g);
        }
    }

    pub(crate) fn read(bits: &mut BitReader<'_>, alphabet: usize) -> Result<Self, CodecError> {
        let bad = |why| CodecError::malformed("frequency table", why);
        let precision = bits.get(4)? as u32;
        if precision > PROB_BITS {
            return Err(bad("precision above 12 bits"));
        }
        let first = get_exp_golomb(bits, 1)?;
        let more = get_exp_golomb(bits, 1)?;
        if first.saturating_add(more) >= alphabet as u64 {
            return Err(bad("a symbol beyond its alphabet"));
        }
        let g = bits.get(3)? as u32;
        let mut left = 1u64 << precision;
        let mut values = Vec::with_capacity(more as usize + 1);
        for _ in 0..more {
            let f = get_exp_golomb(bits, g)?;
            left = left.checked_sub(f).filter(|&left| left > 0).ok_or(bad("frequencies exceed their sum"))?;
            values.push(f as u32);
        }
        values.push(left as u32);
        Ok(Frequencies { precision, first: first as usize, values })
    }

    /// The table that the entropy coder works with.
    pub(crate) fn table(&self) -> SymbolTable {
        let mut full = vec![0u16; self.first + self.values.len()];
        for (slot, &f) in full[self.first..].iter_mut().zip(&self.values) {
            *slot = (f << (PROB_BITS - self.precision)) as u16;
        }
        SymbolTable::new(&full)
    }
}

/// Entropy of one symbol, in bits.
pub(crate) fn entropy_bits(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    let used = counts.iter().filter(|&&count| count > 0);
    used.map(|&count| count as f64 / total).map(|p| -p * p.log2()).sum()
}

/// Scale counts to integers that sum to `total`, none of the used ones 0.
fn scale(counts: &[u64], total: u32) -> Vec<u32> {
    let sum: u64 = counts.iter().sum();
    let exact = |count: u64| count as f64 * f64::from(total) / sum as f64;
    let mut scaled: Vec<u32> =
        counts.iter().map(|&c| if c == 0 { 0 } else { (exact(c).round() as u32).max(1) }).collect();
    let mut error = i64::from(total) - scaled.iter().map(|&f| i64::from(f)).sum::<i64>();
    // What rounding left over is lost on a symbol much larger than it.
    let largest = (0..scaled.len()).max_by_key(|&i| scaled[i]).expect("a symbol");
    if error.unsigned_abs() * 16 <= u64::from(scaled[largest]) {
        scaled[largest] = (i64::from(scaled[largest]) + error) as u32;
        error = 0;
    }
    // Move the symbol whose cost suffers least: the largest gain or smallest loss per unit.
    let step = error.signum();
    let worth = |i: usize, f: u32| counts[i] as f64 * ((f64::from(f) + step as f64) / f64::from(f)).ln();
    let mut worths: Vec<f64> = match error {
        0 => Vec::new(),
        _ => scaled.iter().enumerate().map(|(i, &f)| if f == 0 { 0.0 } else { worth(i, f) }).collect(),
    };
    while error != 0 {
        let candidates = (0..scaled.len()).filter(|&i| counts[i] > 0 && (step > 0 || scaled[i] > 1));
        let best = candidates.max_by(|&a, &b| worths[a].total_cmp(&worths[b])).expect("a symbol to adjust");
        let most = if step > 0 { error } else { (-error).min(i64::from(scaled[best]) - 1) };
        let bulk = (most / 4).max(1);
        scaled[best] = (i64::from(scaled[best]) + step * bulk) as u32;
        worths[best] = worth(best, scaled[best]);
        error -= step * bulk;
    }
    scaled
}

/// Exp-Golomb code of order `k`: value + 2^k with its leading bit found after a run of zeros.
pub(crate) fn put_exp_golomb(out: &mut BitWriter, value: u64, k: u32) {
    let shifted = value + (1 << k);
    let bits = 64 - shifted.leading_zeros();
    out.put(0, bits - 1 - k);
    out.put(1, 1);
    out.put(shifted, bits - 1);
}

/// Bits of an exp-Golomb code.
pub(crate) fn exp_golomb_bits(value: u64, k: u32) -> u64 {
    let bits = 64 - (value + (1 << k)).leading_zeros();
    u64::from(2 * bits - 1 - k)
}

/// Inverse of [`put_exp_golomb`]; values of more than 40 bits are refused.
pub(crate) fn get_exp_golomb(bits: &mut BitReader<'_>, k: u32) -> Result<u64, CodecError> {
    let mut width = k;
    while bits.get(1)? == 0 {
        width += 1;
        if width > 40 {
            return Err(CodecError::malformed("exp-Golomb code", "longer than 40 bits"));
        }
    }
    Ok((bits.get(width)? | 1 << width) - (1 << k))
}

/// Signed values as 0, -1, 1, -2, ...
pub(crate) fn put_signed(out: &mut BitWriter, value: i64, k: u32) {
    put_exp_golomb(out, ((value << 1) ^ (value >> 63)) as u64, k);
}

/// Inverse of [`put_signed`].
pub(crate) fn get_signed(bits: &mut BitReader<'_>, k: u32) -> Result<i64, CodecError> {
    let value = get_exp_golomb(bits, k)? as i64;
    Ok((value >> 1) ^ -(value & 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fitted_tables_come_back_and_cost_close_to_entropy() {
        println!("seed 3");
        let mut rng = fastrand::Rng::with_seed(3);
        for round in 0..200 {
            let mut counts = vec![0u64; 256];
            for _ in 0..rng.usize(1..=256) {
                counts[rng.usize(..256)] = 1u64 << rng.u32(..(1 + round % 30));
            }
            counts[rng.usize(..256)] += 1;
            let (fitted, bits) = Frequencies::fit(&counts);
            let mut writer = BitWriter::new();
            fitted.write(&mut writer);
            let bytes = writer.finish();
            let back = Frequencies::read(&mut BitReader::new(&bytes), 256).unwrap();
            assert_eq!(back, fitted);
            let table = back.table();
            let data: f64 = counts
                .iter()
                .enumerate()
                .filter(|c| *c.1 > 0)
                .map(|(s, &c)| c as f64 * table.cost_bits(s))
                .sum();
            assert!(bits >= data && bits <= data + bytes.len() as f64 * 8.0 + 1.0);
        }
    }
}
