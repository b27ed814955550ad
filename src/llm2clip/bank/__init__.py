"""The bank: for every sample where its picture lies, and the teacher's vector of each distinct caption."""
