//! Any bytes as events of the pager's pure parts: each decides as its reference does, and nobody is left waiting.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Err(broken) = pageferry::fuzzing::pager_ops(input) {
        panic!("{broken}");
    }
});
