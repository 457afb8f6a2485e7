//! Words of 8 to 64 bits and the order map between their bit patterns and signed integers.
//!
//! For floats the map sends sign-magnitude patterns to two's complement so that neighbouring values are
//! neighbouring integers: a difference of 1 is one ULP. It is a bijection on every pattern: +0 is 0, -0 is -1,
//! NaN payloads lie beyond the infinities. For integers it is the identity. Differences wrap.

/// An unsigned machine word that a tensor is made of.
pub(crate) trait Word: Copy + Eq + Default + Send + Sync + 'static {
    /// Bytes of a word.
    const BYTES: usize;
    /// Bits of a word.
    const BITS: u32;

    /// The word at the start of `bytes` (little endian). `bytes` is exactly one word long.
    fn load(bytes: &[u8]) -> Self;
    /// Write the word to `bytes`, exactly one word long.
    fn store(self, bytes: &mut [u8]);
    /// Widen with zeros.
    fn to_u64(self) -> u64;
    /// Keep the low bits.
    fn from_u64(value: u64) -> Self;
    /// Wrapping sum.
    fn add(self, other: Self) -> Self;
    /// Wrapping difference.
    fn sub(self, other: Self) -> Self;
    /// The float order map and, because it is an involution, its inverse.
    fn flip_order(self) -> Self;
    /// Rotate left by one: a float's sign moves below its magnitude.
    fn rotl1(self) -> Self;
    /// Inverse of [`Word::rotl1`].
    fn rotr1(self) -> Self;
    /// The byte that starts at bit `shift`.
    fn byte(self, shift: u32) -> u8;
}

macro_rules! word {
    ($unsigned:ty, $signed:ty) => {
        impl Word for $unsigned {
            const BYTES: usize = size_of::<$unsigned>();
            const BITS: u32 = <$unsigned>::BITS;

            #[inline(always)]
            fn load(bytes: &[u8]) -> Self {
                let mut word = [0; size_of::<$unsigned>()];
                word.copy_from_slice(bytes);
                <$unsigned>::from_le_bytes(word)
            }
            #[inline(always)]
            fn store(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $unsigned
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn flip_order(self) -> Self {
                self ^ (((self as $signed >> (<$unsigned>::BITS - 1)) as $unsigned) >> 1)
            }
            #[inline(always)]
            fn rotl1(self) -> Self {
                self.rotate_left(1)
            }
            #[inline(always)]
            fn rotr1(self) -> Self {
                self.rotate_right(1)
            }
            #[inline(always)]
            fn byte(self, shift: u32) -> u8 {
                (self >> shift) as u8
            }
        }
    };
}
word!(u8, i8);
word!(u16, i16);
word!(u32, i32);
word!(u64, i64);

/// How the words of a dtype are compared: floats through the order map, integers as they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OrderMap {
    /// Words are sign-magnitude floats.
    pub(crate) is_float: bool,
}

impl OrderMap {
    /// The wrapping signed step from `base` to `new` in units of the last place.
    #[inline(always)]
    pub(crate) fn step<W: Word>(self, base: W, new: W) -> W {
        if self.is_float { new.flip_order().sub(base.flip_order()) } else { new.sub(base) }
    }

    /// The word that lies `step` after `base`.
    #[inline(always)]
    pub(crate) fn apply<W: Word>(self, base: W, step: W) -> W {
        if self.is_float { base.flip_order().add(step).flip_order() } else { base.add(step) }
    }
}

/// Word `index` of a little-endian byte slice.
#[inline(always)]
pub(crate) fn word_at<W: Word>(bytes: &[u8], index: usize) -> W {
    W::load(&bytes[index * W::BYTES..(index + 1) * W::BYTES])
}

/// Overwrite word `index` of a little-endian byte slice.
#[inline(always)]
pub(crate) fn set_word<W: Word>(bytes: &mut [u8], index: usize, word: W) {
    word.store(&mut bytes[index * W::BYTES..(index + 1) * W::BYTES]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_map_is_monotone_on_floats_and_a_bijection_on_all_patterns() {
        let values = [f32::NEG_INFINITY, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.0, f32::MAX, f32::INFINITY];
        let mapped: Vec<i32> = values.iter().map(|v| v.to_bits().flip_order() as i32).collect();
        assert!(mapped.windows(2).all(|pair| pair[0] < pair[1]), "{mapped:?}");
        assert_eq!(0x8000_0000u32.flip_order() as i32, -1);
        for pattern in 0..=u16::MAX {
            assert_eq!(pattern.flip_order().flip_order(), pattern);
            let order = OrderMap { is_float: true };
            assert_eq!(order.apply(0x3f80u16, order.step(0x3f80u16, pattern)), pattern);
        }
    }
}
