//! Identities as text and as files: what survives, what is refused, who may read.
//!
//! Role: holds the invariants of `identity`. Neighbours: none but `identity`.
//! Invariants: files are made in a fresh temporary directory each; nothing here depends on the user or the umask.

use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_peer_id_survives_its_text(bytes in any::<[u8; 32]>()) {
        let id = PeerId::from_bytes(bytes);
        let text = id.to_string();
        prop_assert_eq!(text.len(), 64);
        prop_assert!(text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')));
        prop_assert_eq!(text.parse(), Ok(id));
        prop_assert_eq!(format!(" \t{}\r\n", text.to_uppercase()).parse(), Ok(id));
        prop_assert_eq!(id.as_bytes(), &bytes);
    }

    #[test]
    fn any_other_text_is_refused_without_panic(text in "[0-9a-fxé ]{0,70}") {
        let digits = text.trim().chars().filter(char::is_ascii_hexdigit).count();
        let valid = digits == 64 && text.trim().chars().count() == 64;
        prop_assert_eq!(text.parse::<PeerId>().is_ok(), valid);
    }

    #[test]
    fn broken_certificates_are_refused_without_panic(cut in 0usize..200, at in 0usize..200, bit in 0u8..8) {
        let identity = Identity::generate().unwrap();
        let mut der = identity.certified().cert[0].to_vec();
        der[at] ^= 1 << bit;
        der.truncate(der.len() - cut);
        if let Ok(id) = PeerId::of_certificate(&der.into()) {
            prop_assert_eq!(cut, 0);
            prop_assert_eq!(id.as_bytes().len(), 32);
        }
    }
}

#[test]
fn the_id_text_is_the_hash_in_reading_order_and_errors_point_at_the_fault() {
    let id = PeerId::from_bytes(std::array::from_fn(|i| i as u8));
    assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f");
    let refuse = |text: String| text.parse::<PeerId>().unwrap_err();
    assert_eq!(refuse("a".repeat(63)), PeerIdError::Length { got_digits: 63 });
    assert_eq!(refuse("a".repeat(65)), PeerIdError::Length { got_digits: 65 });
    assert_eq!(refuse(String::new()), PeerIdError::Length { got_digits: 0 });
    assert_eq!(refuse(format!(" ab:{}", "a".repeat(61))), PeerIdError::Character { character: ':', position: 3 });
    assert_eq!(refuse(format!("{}é", "a".repeat(63))), PeerIdError::Character { character: 'é', position: 64 });
}

#[test]
fn a_saved_identity_is_private_and_loads_as_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("identity.pem");
    fs::write(&path, "older").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let identity = Identity::generate().unwrap();
    identity.save(&path).unwrap();

    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "the temporary file is gone");
    let loaded = Identity::load(&path).unwrap();
    assert_eq!(loaded.peer_id(), identity.peer_id());
    assert_eq!(loaded.to_pem(), identity.to_pem());
    assert_ne!(Identity::generate().unwrap().peer_id(), identity.peer_id());
}

#[test]
fn a_file_that_others_may_touch_is_refused_with_its_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("identity.pem");
    Identity::generate().unwrap().save(&path).unwrap();
    for mode in [0o644, 0o640, 0o604, 0o620, 0o602] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let text = Identity::load(&path).unwrap_err().to_string();
        assert!(text.contains(&format!("mode {mode:04o}")), "{text}");
        assert!(text.ends_with(&format!("chmod 600 {}", path.display())), "{text}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    Identity::load(&path).unwrap();
}

#[test]
fn a_failed_save_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let taken = directory.path().join("taken");
    fs::create_dir(&taken).unwrap();
    let identity = Identity::generate().unwrap();
    assert!(matches!(identity.save(&taken), Err(IdentityError::Write { path, .. }) if path == taken));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "only the directory that was there");
    assert!(matches!(identity.save(directory.path().join("none/identity.pem")), Err(IdentityError::Write { .. })));
    assert!(matches!(identity.save("/"), Err(IdentityError::Write { .. })));
}

#[test]
fn a_file_that_holds_no_identity_is_refused_by_name_and_read_within_a_bound() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("identity.pem");
    let load = |content: String| {
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        Identity::load(&path).unwrap_err()
    };
    let largest = load("#".repeat(MAX_FILE_BYTES as usize));
    assert!(matches!(&largest, IdentityError::InFile { path: named, .. } if *named == path), "{largest}");
    assert!(largest.to_string().contains("0 PRIVATE KEY sections"), "{largest}");
    let refused = Identity::load(directory.path()).unwrap_err().to_string();
    assert!(refused.contains("not a regular file"), "{refused}");
    let larger = load("#".repeat(MAX_FILE_BYTES as usize + 1));
    assert!(larger.to_string().contains("more than 1 MiB"), "{larger}");
}

#[test]
fn a_chain_for_another_key_is_refused_with_both_ids() {
    let (ours, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let error = ours.clone().with_chain(&other.to_pem()).unwrap_err();
    assert!(matches!(error, IdentityError::Mismatch { key, leaf } if key == ours.peer_id() && leaf == other.peer_id()));
    let kept = ours.clone().with_chain(&format!("{}\n{}", ours.to_pem(), other.to_pem())).unwrap();
    assert_eq!((kept.peer_id(), kept.certified().cert.len()), (ours.peer_id(), 2));
    assert_eq!(Identity::from_pem(&kept.to_pem()).unwrap().certified().cert, kept.certified().cert);
}

#[test]
fn damaged_text_says_what_is_wrong() {
    let pem = Identity::generate().unwrap().to_pem();
    let refuse = |pem: &str| Identity::from_pem(pem).unwrap_err().to_string();
    let certificate_at = pem.find("-----BEGIN CERTIFICATE").unwrap();
    assert!(refuse(&pem[..certificate_at]).contains("no CERTIFICATE section"));
    assert!(refuse(&pem[certificate_at..]).contains("0 PRIVATE KEY sections"));
    assert!(refuse(&pem.replace("PRIVATE KEY", "EC PRIVATE KEY")).contains("older form than PKCS#8"));
    assert!(refuse(&pem.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY")).contains("0 PRIVATE KEY sections"));
    assert!(refuse(&format!("{pem}{pem}")).contains("2 PRIVATE KEY sections"));
    assert!(refuse(pem.trim_end().trim_end_matches('-')).contains("no END line for CERTIFICATE"));
    assert!(refuse(&pem.replace("-----BEGIN CERTIFICATE-----\nMII", "-----BEGIN CERTIFICATE-----\nAAA")).contains("certificate 1"));
    assert!(refuse(&pem.replace("-----BEGIN PRIVATE KEY-----\nM", "-----BEGIN PRIVATE KEY-----\nA")).contains("cannot be used"));
}

#[test]
fn debug_shows_the_id_and_no_key() {
    let identity = Identity::generate().unwrap();
    assert_eq!(format!("{identity:?}"), format!("Identity {{ peer_id: {:?}, certificates: 1, .. }}", identity.peer_id()));
}

#[test]
fn secrets_are_an_identitys_own_and_one_for_each_purpose() {
    let (identity, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let secret = |identity: &Identity, purpose| identity.secret(purpose).as_ref().to_vec();
    let again = Identity::from_pem(&identity.to_pem()).unwrap();
    assert_eq!(secret(&identity, "a"), secret(&again, "a"));
    assert_ne!(secret(&identity, "a"), secret(&identity, "b"));
    assert_ne!(secret(&identity, "a"), secret(&other, "a"));
}
