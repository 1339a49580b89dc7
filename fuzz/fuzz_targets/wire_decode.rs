//! Any bytes as a stream of frames: no panic, and what decodes encodes to the same bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Err(broken) = pageferry::fuzzing::wire_decode(input) {
        panic!("{broken}");
    }
});
