"""The bank: for every sample where its image lies, and the teacher's vector of each distinct caption."""
