// SPDX-License-Identifier: MIT OR Apache-2.0
//! Gives up the file system and the network: with everything opened, no path is of use any more (Landlock, Linux
//! `Documentation/userspace-api/landlock.rst`).

use landlock::{Access as _, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, ABI};

use crate::error::Error;

/// Gives them up, for this thread and those it starts later. Kernels without Landlock (or with an older one) are
/// satisfied with less; that is logged, not an error. Says whether there is any confinement.
///
/// # Errors
/// [`Error::Host`] if a kernel that has Landlock refuses.
pub(super) fn give_up() -> Result<bool, Error> {
    let fail = |error: landlock::RulesetError| super::refused(&error);
    let abi = ABI::V5;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(abi)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(fail)?;
    if status.ruleset != RulesetStatus::FullyEnforced {
        tracing::info!("this kernel confines axvmm in part or not at all (Landlock)");
    }
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn no_file_can_be_opened_inside() {
        std::thread::spawn(|| {
            let confined = give_up().unwrap();
            assert_eq!(File::open("/etc/passwd").is_err(), confined);
        })
        .join()
        .unwrap();
        assert!(File::open("/etc/passwd").is_ok(), "other threads are not confined");
    }
}
