//! What a drive holds, told from well-known bytes at well-known places. It errs on the safe side: one magic number is
//! enough. Not here: whether the kernel uses the drive now (see [`crate::drives`]).
//!
//! Sources: UEFI specification 2.10, 5.3.2 (GPT); the kernel's include/uapi/linux/raid/md_p.h (MD), fs/ext4/ext4.h,
//! fs/xfs/libxfs/xfs_format.h, include/uapi/linux/btrfs_tree.h; lvm2's label.h; LUKS on-disk format 1.2.3 and 2.0.

use std::io;

/// Reads up to `buf.len()` bytes at an offset; fewer only at the end of the drive.
pub type Reader<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<usize> + 'a;

const HEAD: usize = 72 << 10;
const MD_MAGIC: u32 = 0xa92b_4efc;

/// Everything recognised on a drive of `size` bytes, in words; empty for a blank or unknown one.
pub fn find(read: &mut Reader<'_>, size: u64) -> io::Result<Vec<&'static str>> {
    let mut head = vec![0; HEAD];
    let got = read(0, &mut head)?;
    head.truncate(got);
    let has = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));

    let mut found = Vec::new();
    let mut note = |is: bool, name| {
        if is && !found.contains(&name) {
            found.push(name);
        }
    };
    // LBA 1, for logical blocks of 512 and of 4096 bytes.
    note(has(512, b"EFI PART") || has(4096, b"EFI PART"), "a GPT partition table");
    note(has(510, &[0x55, 0xaa]) && head[446..510].chunks(16).any(|entry| entry[4] != 0), "an MBR partition table");
    note((0..4).any(|sector| has(sector * 512, b"LABELONE")), "an LVM physical volume");
    note(has(0, b"LUKS\xba\xbe"), "a LUKS container");
    note(has(0, b"XFSB"), "an xfs file system");
    note(has(0x438, &[0x53, 0xef]), "an ext2, ext3 or ext4 file system");
    note(has(0x1_0040, b"_BHRfS_M"), "a btrfs file system");
    note(has(4086, b"SWAPSPACE2") || has(4086, b"SWAP-SPACE"), "a swap area");
    note(has(3, b"NTFS    ") || has(3, b"EXFAT   "), "an NTFS or exFAT file system");
    note(has(54, b"FAT1") || has(82, b"FAT32"), "a FAT file system");
    note(has(24, b"bluestore block device") || has(0, b"bluestore block device"), "a Ceph OSD");
    let md = MD_MAGIC.to_le_bytes();
    note(has(0, &md) || has(4096, &md), "an MD RAID member");

    // At the end: the backup GPT, and MD superblocks 1.0 (8 KiB before the end, on 4 KiB) and 0.90 (64 KiB, on 64 KiB).
    let mut at = |offset: Option<u64>, magic: &[u8]| -> io::Result<bool> {
        let Some(offset) = offset else { return Ok(false) };
        let mut buf = [0; 8];
        let got = read(offset, &mut buf)?;
        Ok(buf[..got].starts_with(magic))
    };
    let backup_gpt = at(size.checked_sub(512), b"EFI PART")? || at(size.checked_sub(4096), b"EFI PART")?;
    note(backup_gpt, "a GPT partition table");
    let new_md = at(size.checked_sub(8 << 10).map(|o| o & !4095), &md)?;
    let old_md = at((size & !0xffff).checked_sub(64 << 10), &md)?;
    note(new_md || old_md, "an MD RAID member");
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 1 << 20;

    fn look(drive: &[u8]) -> Vec<&'static str> {
        let mut read = |offset: u64, buf: &mut [u8]| {
            let rest = drive.get(offset as usize..).unwrap_or(&[]);
            let len = rest.len().min(buf.len());
            buf[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        };
        find(&mut read, drive.len() as u64).unwrap()
    }

    fn with(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut drive = vec![0; SIZE];
        drive[offset..offset + magic.len()].copy_from_slice(magic);
        drive
    }

    #[test]
    fn each_signature_is_found_at_its_place() {
        let md = MD_MAGIC.to_le_bytes();
        let cases: &[(usize, &[u8], &str)] = &[
            (512, b"EFI PART", "a GPT partition table"),
            (4096, b"EFI PART", "a GPT partition table"),
            (SIZE - 512, b"EFI PART", "a GPT partition table"),
            (SIZE - 4096, b"EFI PART", "a GPT partition table"),
            (1024, b"LABELONE", "an LVM physical volume"),
            (0, b"LUKS\xba\xbe", "a LUKS container"),
            (0, b"XFSB", "an xfs file system"),
            (0x438, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
            (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
            (4086, b"SWAPSPACE2", "a swap area"),
            (4096, &md, "an MD RAID member"),
            (SIZE - 8192, &md, "an MD RAID member"),
            (SIZE - 65536, &md, "an MD RAID member"),
        ];
        for (offset, magic, name) in cases {
            assert_eq!(look(&with(*offset, magic)), [*name], "at {offset}");
        }
    }

    #[test]
    fn boot_sector_without_partitions_is_no_partition_table() {
        assert_eq!(look(&with(510, &[0x55, 0xaa])), [] as [&str; 0]);
        let mut drive = with(510, &[0x55, 0xaa]);
        drive[446 + 16 + 4] = 0x83;
        assert_eq!(look(&drive), ["an MBR partition table"]);
    }

    #[test]
    fn blank_drive_holds_nothing() {
        assert_eq!(look(&vec![0; SIZE]), [] as [&str; 0]);
        assert_eq!(look(&vec![0xff; SIZE]), [] as [&str; 0]);
    }

    #[test]
    fn drive_that_fails_to_read_is_an_error_and_not_blank() {
        let mut read = |_: u64, _: &mut [u8]| Err(io::Error::other("medium error"));
        assert!(find(&mut read, SIZE as u64).is_err());
    }

    proptest! {
        #[test]
        fn drives_of_any_size_and_content_are_looked_at_without_a_panic(drive in prop::collection::vec(any::<u8>(), 0..9000)) {
            look(&drive);
        }
    }
}
