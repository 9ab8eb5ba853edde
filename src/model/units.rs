//! The symbols of units that are registered for SenML.
//!
//! Source: the IANA registries "SenML Units" (RFC 8428 section 12.1 and what was added since) and "Secondary Units"
//! (RFC 8798 section 3 and what was added since).

/// The most bytes in a unit's symbol, registered or not.
pub const UNIT_BYTES_MAX: usize = 32;

/// Primary units, in the order of ASCII.
const PRIMARY: &[&str] = &[
    "%", "%EL", "%RH", "/", "1/min", "1/s", "A", "B", "Bq", "Bspl", "C", "Cel", "EL", "F", "Gy", "H", "Hz", "J", "J/m", "K", "N", "NTU",
    "Ohm", "Pa", "S", "S/m", "Sv", "T", "V", "VA", "VAs", "W", "W/m2", "Wb", "beat/min", "beats", "bit", "bit/s", "cd", "cd/m2", "count",
    "dB", "dBW", "deg", "g", "kat", "kg", "kg/m3", "l", "l/s", "lat", "lm", "lon", "lx", "m", "m/s", "m/s2", "m2", "m3", "m3/s", "mol",
    "pH", "rad", "s", "sr", "var", "vars",
];

/// Secondary units: a primary unit times a factor, in the order of ASCII.
const SECONDARY: &[&str] = &[
    "/100", "/1000", "Ah", "B/s", "GB", "KiB", "MB/s", "MHz", "Mbit/s", "VAh", "Wh", "Wh/km", "cm", "dBm", "g/l", "h", "hPa", "kVA",
    "kVAh", "kW", "kWh", "km", "km/h", "kvar", "kvarh", "m/h", "mA", "mV", "mg/l", "min", "mm", "mm/h", "ms", "ppb", "ppm", "ppt", "ug/l",
    "ug/m3", "varh",
];

/// Whether `symbol` is in one of the registries; case matters.
pub fn is_registered(symbol: &str) -> bool {
    PRIMARY.binary_search(&symbol).is_ok() || SECONDARY.binary_search(&symbol).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_sorted_and_distinct() {
        for table in [PRIMARY, SECONDARY] {
            assert!(table.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn registered_symbols_are_known_and_others_are_not() {
        for symbol in ["Cel", "%RH", "kWh", "m/s2", "ug/m3", "/", "NTU"] {
            assert!(is_registered(symbol), "{symbol}");
        }
        for symbol in ["", "cel", "°C", "celsius", "KWh", "psi"] {
            assert!(!is_registered(symbol), "{symbol}");
        }
    }
}
