//! Conversions between f32 and 16-bit floats, on bit patterns.

/// The f32 with the value of an f16. NaN payloads move up with the mantissa.
pub(crate) fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff);
    let bits = match magnitude {
        0 => 0,
        0x7c00.. => 0x7f80_0000 | (magnitude & 0x3ff) << 13,
        0x400.. => (magnitude << 13) + (112 << 23),
        // A subnormal is its integer times 2^-24, which f32 holds as a normal number.
        _ => (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits(),
    };
    f32::from_bits(sign | bits)
}

/// The nearest f16, ties to even. NaN becomes 0x7e00 with its sign.
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let half = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x477f_f000 {
        0x7c00
    } else if magnitude >= 113 << 23 {
        let rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        ((rounded - (112 << 23)) >> 13) as u16
    } else {
        // Subnormal: adding 1/2 lines the mantissa up so that the hardware rounds to units of 2^-24.
        let aligned = f32::from_bits(magnitude) + 0.5;
        (aligned.to_bits() - 0.5f32.to_bits()) as u16
    };
    sign | half
}

/// The nearest bf16, ties to even. NaN becomes 0x7fc0 with its sign.
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 & 0x8000 | 0x7fc0;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_comes_back_and_halfway_points_go_to_even() {
        for half in 0..=u16::MAX {
            let value = f16_to_f32(half);
            if value.is_nan() {
                assert_eq!(f32_to_f16(value) & 0x7fff, 0x7e00);
                continue;
            }
            assert_eq!(f32_to_f16(value), half);
            let next = f16_to_f32(half.wrapping_add(1));
            if half & 0x7fff < 0x7bff && next.is_finite() {
                let even = if half & 1 == 0 { half } else { half + 1 };
                assert_eq!(f32_to_f16((value + next) / 2.0), even, "{half:#x}");
            }
        }
        assert_eq!(f32_to_f16(65519.9), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7f80);
    }
}
