//! Element types of safetensors, seen as machine words.

/// Where a sign-magnitude float keeps its exponent. The sign is the top bit, the mantissa the low bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloatLayout {
    /// Width of the exponent field.
    pub exponent_bits: u32,
    /// Width of the mantissa field, which starts at bit 0.
    pub mantissa_bits: u32,
}

/// Every element type that safetensors names. Discriminants are the format's dtype codes and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
#[allow(missing_docs, non_camel_case_types)]
pub enum Dtype {
    Bool = 0,
    U8 = 1,
    I8 = 2,
    U16 = 3,
    I16 = 4,
    U32 = 5,
    I32 = 6,
    U64 = 7,
    I64 = 8,
    F16 = 9,
    Bf16 = 10,
    F32 = 11,
    F64 = 12,
    F8E4M3 = 13,
    F8E5M2 = 14,
    F8E8M0 = 15,
    F8E4M3Fnuz = 16,
    F8E5M2Fnuz = 17,
    F4 = 18,
    F6E2M3 = 19,
    F6E3M2 = 20,
    C64 = 21,
}

/// All dtypes with the name each has in a safetensors header.
const NAMES: [(Dtype, &str); 22] = [
    (Dtype::Bool, "BOOL"),
    (Dtype::U8, "U8"),
    (Dtype::I8, "I8"),
    (Dtype::U16, "U16"),
    (Dtype::I16, "I16"),
    (Dtype::U32, "U32"),
    (Dtype::I32, "I32"),
    (Dtype::U64, "U64"),
    (Dtype::I64, "I64"),
    (Dtype::F16, "F16"),
    (Dtype::Bf16, "BF16"),
    (Dtype::F32, "F32"),
    (Dtype::F64, "F64"),
    (Dtype::F8E4M3, "F8_E4M3"),
    (Dtype::F8E5M2, "F8_E5M2"),
    (Dtype::F8E8M0, "F8_E8M0"),
    (Dtype::F8E4M3Fnuz, "F8_E4M3FNUZ"),
    (Dtype::F8E5M2Fnuz, "F8_E5M2FNUZ"),
    (Dtype::F4, "F4"),
    (Dtype::F6E2M3, "F6_E2M3"),
    (Dtype::F6E3M2, "F6_E3M2"),
    (Dtype::C64, "C64"),
];

impl Dtype {
    /// Every dtype, in the order of the format's codes.
    pub fn all() -> impl Iterator<Item = Dtype> {
        NAMES.iter().map(|&(dtype, _)| dtype)
    }

    /// The dtype of a safetensors header name such as `BF16`, or `None` for a name this version does not know.
    pub fn from_name(name: &str) -> Option<Dtype> {
        NAMES.iter().find(|&&(_, n)| n == name).map(|&(dtype, _)| dtype)
    }

    /// The safetensors header name.
    pub fn name(self) -> &'static str {
        NAMES[self as usize].1
    }

    /// The dtype of a format code, or `None` for a reserved code.
    pub fn from_code(code: u8) -> Option<Dtype> {
        NAMES.get(usize::from(code)).map(|&(dtype, _)| dtype)
    }

    /// The format's code.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// Bits of storage of one element. Sub-byte elements are packed; their tensors are whole bytes.
    pub fn element_bits(self) -> u32 {
        match self {
            Dtype::F4 => 4,
            Dtype::F6E2M3 | Dtype::F6E3M2 => 6,
            Dtype::C64 => 64,
            other => other.word_bytes() as u32 * 8,
        }
    }

    /// Bytes of one coded word: 1, 2, 4 or 8. Complex numbers are two words; packed sub-byte elements are
    /// coded as the bytes that hold them.
    pub fn word_bytes(self) -> usize {
        match self {
            Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::U32 | Dtype::I32 | Dtype::F32 | Dtype::C64 => 4,
            Dtype::U64 | Dtype::I64 | Dtype::F64 => 8,
            _ => 1,
        }
    }

    /// The float layout of one word, or `None` where words are plain integers.
    pub fn float_layout(self) -> Option<FloatLayout> {
        let (exponent_bits, mantissa_bits) = match self {
            Dtype::F16 => (5, 10),
            Dtype::Bf16 => (8, 7),
            Dtype::F32 | Dtype::C64 => (8, 23),
            Dtype::F64 => (11, 52),
            Dtype::F8E4M3 | Dtype::F8E4M3Fnuz => (4, 3),
            Dtype::F8E5M2 | Dtype::F8E5M2Fnuz => (5, 2),
            _ => return None,
        };
        Some(FloatLayout { exponent_bits, mantissa_bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_a_bijection() {
        for (code, dtype) in Dtype::all().enumerate() {
            assert_eq!(dtype.code() as usize, code);
            assert_eq!(Dtype::from_code(code as u8), Some(dtype));
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
            if let Some(layout) = dtype.float_layout() {
                assert_eq!(1 + layout.exponent_bits + layout.mantissa_bits, dtype.word_bytes() as u32 * 8);
            }
        }
        assert_eq!(Dtype::from_code(22), None);
    }
}
