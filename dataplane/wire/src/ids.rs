//! Identifiers as they lie on drives: 16 bytes, compared and printed, never interpreted (control gives them meaning).

macro_rules! id {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $name(pub [u8; 16]);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                for (i, byte) in self.0.iter().enumerate() {
                    if matches!(i, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    )+};
}

id! {
    /// A cluster: drives of another are foreign.
    ClusterId,
    /// A node of a cluster.
    NodeId,
    /// A drive, as control named it when it was added.
    DriveId,
    /// Random, made anew at each format: records of an earlier life of the drive do not carry it.
    Incarnation,
    VolumeId,
    SegmentId,
    ReplicaId,
    /// A host, as it names itself when it connects; zeros for one that does not.
    HostId,
    SnapshotId,
}
